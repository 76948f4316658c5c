"""The folder of a run: made once from a run file, and reopened by every later start.

The process that the user started makes it, or rank 0 under a launcher; the ranks then read everything from it.
Only the folder's content is the state of a run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from univitar_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import changed_result, dump_config, load_config
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, DEEPSPEED, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.unused import unused_parts
from univitar_ds.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 200_000
"""Most captions that a tokenizer is trained on; more change it little."""


def create_run(config: RunConfig, recipe: str, world_size: int) -> Path:
    """Make the run's folder: resolved config, DeepSpeed JSON and tokenizer. Returns the folder.

    Raises: ConfigError when the folder holds checkpoints, the configurations contradict each other or
        the sources cannot feed the stages (DataError).
    """
    run = Path(config.output, config.name)
    if (run / CHECKPOINTS / "latest").exists():
        raise ConfigError(
            f"{run} holds the checkpoints of an earlier run; continue it with `univitar-ds train --resume {run}`, "
            "choose another name=..., or remove the folder"
        )
    deepspeed = read_deepspeed(config.deepspeed)
    resolve_deepspeed(config, world_size, deepspeed, (recipe, config.deepspeed))
    _check_text_library()
    _report_unused(config)
    _check_sources(config)
    _check_teacher(config)
    if run.exists():
        shutil.rmtree(run)  # without a checkpoint there is nothing to continue
    run.mkdir(parents=True)
    dump_config(config, run / CONFIG)
    (run / DEEPSPEED).write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    _provide_tokenizer(config, run / TOKENIZER)
    return run


def reopen_run(run: Path, overrides: Sequence[str], world_size: int) -> Path:
    """Check that the run in folder `run` can continue with `overrides`, and store them. Returns the folder.

    Raises: ConfigError for a folder without a run, or an override that would change the run's result; DataError
        for sources that are not there any more.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} holds no {CONFIG}, so it is no run; give the folder that an earlier run wrote")
    before, after = load_config(run / CONFIG), load_config(run / CONFIG, overrides)
    changed = changed_result(before, after)
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} would change the result of {run} half-way; "
            "resume without this override, or start a new run under another name"
        )
    deepspeed = read_deepspeed(str(run / DEEPSPEED) if after.deepspeed == before.deepspeed else after.deepspeed)
    resolve_deepspeed(after, world_size, deepspeed, (str(run / CONFIG), after.deepspeed))
    _check_text_library()
    _report_unused(after)
    _check_sources(after)
    dump_config(after, run / CONFIG)
    (run / DEEPSPEED).write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    return run


def _provide_tokenizer(config: RunConfig, target: Path) -> None:
    """The run's tokenizer: the given one, the text tower's own, or one trained on the captions."""
    from univitar_ds.data.sources import iterate_captions
    from univitar_ds.data.storage import StorageSettings
    from univitar_ds.data.text import load_tokenizer, train_tokenizer

    text = config.model.text
    given = Path(text.tokenizer) if text.tokenizer else Path(text.path, TOKENIZER) if text.path else None
    if given:
        load_tokenizer(given)  # refuses a file that is none before anything starts
        shutil.copyfile(given, target)
        return
    settings = StorageSettings.of(config.data)
    captions = iterate_captions(config.data.sources, limit=CAPTIONS_FOR_TOKENIZER, settings=settings)
    train_tokenizer(captions, text.vocab_size).save(str(target))


def _report_unused(config: RunConfig) -> None:
    for told in unused_parts(config):
        logger.warning("%s", told)


def _check_sources(config: RunConfig) -> None:
    """Raises: DataError if a source of training or of the evaluation after it is not there, or holds nothing for it."""
    from univitar_ds.data.contents import check_contents
    from univitar_ds.data.sources import find_shards, validate_sources
    from univitar_ds.data.storage import StorageSettings

    settings = StorageSettings.of(config.data)
    shards = validate_sources(config.data.sources, config.stages, settings)
    try:
        evaluation = find_shards(config.evaluation.sources, settings)
    except DataError as error:
        raise DataError(f"evaluation.sources: {error}") from error
    check_contents(config, shards, evaluation)


def _check_teacher(config: RunConfig) -> None:
    """Its configuration is read before anything starts: a model that cannot teach is refused here."""
    if config.objective.teacher is not None:
        from univitar_ds.model.teacher import read_teacher

        read_teacher(config.objective.teacher)


def _check_text_library() -> None:
    """Raises: InstallationError if this environment cannot build the text tower, before a folder is made for a run."""
    from univitar_ds.model.towers import check_text_library

    check_text_library()
