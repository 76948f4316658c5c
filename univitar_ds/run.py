"""The folder of a run: made once from a run file, and reopened by every later start.

The process that the user started makes it, or rank 0 under a launcher; the ranks then read everything from it.
The folder's content is the only state of a run.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from univitar_ds.atomic_write import replace_text, replacing
from univitar_ds.config.deepspeed import read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import changed_result, dump_config, dumped, load_config
from univitar_ds.config.places import anchored
from univitar_ds.config.run_folder import (
    CHECKPOINTS,
    CONFIG,
    DEEPSPEED,
    EVALUATION,
    EXPORT,
    LOCKS,
    RUN_ENTRIES,
    TOKENIZER,
)
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.unused import unused_parts
from univitar_ds.errors import ConfigError, DataError, writing
from univitar_ds.owned import clear, foreign, is_marked, mark, refuse_link
from univitar_ds.run_lock import RunLock
from univitar_ds.training.checkpoint import atomic_dir

logger = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 200_000
"""Most captions that a tokenizer is trained on; more change it little."""
KIND = "run"
"""Kind of the mark in a run's folder."""


def create_run(config: RunConfig, recipe: str, world_size: int, lock: RunLock | None = None) -> Path:
    """Make the run's folder: resolved config, DeepSpeed JSON and tokenizer. Returns the folder.

    Only what an earlier start without a checkpoint has left there is replaced. A job that its launcher
    has started again continues what it has saved.

    Args: lock: of the folder; taken here and kept. None: taken and released.
    Raises: ConfigError when the folder holds checkpoints or results, or anything that no run writes, or the
        configurations contradict each other; RunLocked while another start has the folder; DataError when the sources
        cannot feed the stages; StorageError.
    """
    run = Path(config.output, config.name)
    with writing(run), _held(run, lock) as lock:
        lock.refuse()
        if atomic_dir.latest(run / CHECKPOINTS) is not None and lock.continues():
            return reopen_run(run, (), world_size, lock)
        _refuse_filled(run, recipe)
        deepspeed = read_deepspeed(config.deepspeed)
        resolve_deepspeed(config, world_size, deepspeed, (recipe, config.deepspeed))
        _check_text_library()
        _report_unused(config)
        _check_sources(config)
        _check_teacher(config)
        run.mkdir(parents=True, exist_ok=True)
        lock.take()
        _refuse_filled(run, recipe)  # another start may have written here since
        clear(run, RUN_ENTRIES)
        mark(run, KIND)
        dump_config(anchored(config), run / CONFIG)
        _write_deepspeed(run, deepspeed)
        _provide_tokenizer(config, run / TOKENIZER)
    return run


def reopen_run(run: Path, overrides: Sequence[str], world_size: int, lock: RunLock | None = None) -> Path:
    """Check that the run in folder `run` can continue with `overrides`, and store them. Returns the folder.

    Args: lock: as of `create_run`.
    Raises: ConfigError for a folder without a run, or an override that would change the run's result; RunLocked while
        another start has the folder; DataError for sources that no longer exist; StorageError.
    """
    if not (run / CONFIG).is_file():
        raise ConfigError(f"{run} holds no {CONFIG}, so it is not a run; give the folder that an earlier run wrote")
    with writing(run), _held(run, lock) as lock:
        lock.take()
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
        mark(run, KIND)  # those of earlier versions have none
        dump_config(anchored(after), run / CONFIG)
        _write_deepspeed(run, deepspeed)
    return run


@contextmanager
def _held(run: Path, lock: RunLock | None) -> Iterator[RunLock]:
    """The caller's lock, which is kept, or a new one for the body."""
    if lock is not None:
        yield lock
        return
    with RunLock(run) as own:
        yield own


def _refuse_filled(run: Path, recipe: str) -> None:
    """Raises: ConfigError for a folder that holds more than what a start without a checkpoint leaves."""
    if run.is_symlink() and not run.exists():
        raise ConfigError(f"{run} is a link to nothing; remove the link, or choose another name=...")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; choose another name=... or output=...")
    if not run.exists() or foreign(run, LOCKS) is None:
        return
    refuse_link(run)
    if atomic_dir.latest(run / CHECKPOINTS) is not None:
        raise ConfigError(
            f"{run} holds the checkpoints of an earlier run; continue it with `univitar-ds train --resume {run}`, "
            "choose another name=..., or remove the folder"
        )
    results = next((name for name in (EXPORT, EVALUATION) if (run / name).exists()), None)
    if results is not None:
        raise ConfigError(
            f"{run} holds the results of an earlier run ({results}); choose another name=..., or remove the folder"
        )
    file = Path(recipe)
    if file.is_file() and file.resolve().is_relative_to(run.resolve()):
        raise ConfigError(
            f"the run file {recipe} is in the folder of its run, {run}, whose files are replaced; copy it elsewhere"
        )
    known = RUN_ENTRIES | LOCKS if is_marked(run, KIND) or _is_earlier(run) else LOCKS
    found = foreign(run, known)
    if found is not None:
        raise ConfigError(
            f"{run} holds {found}, which no run has written there; choose another name=... or output=..., or move it "
            "elsewhere"
        )


def _is_earlier(run: Path) -> bool:
    """Whether a folder without a mark was made by an earlier version, judged by its config.yaml."""
    try:
        text = (run / CONFIG).read_text(encoding="utf-8")
        return dumped(yaml.safe_load(text)) == text and load_config(run / CONFIG).name == run.name
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError):
        return False


def _write_deepspeed(run: Path, content: dict) -> None:
    replace_text(run / DEEPSPEED, json.dumps(content, indent=2) + "\n")


def _provide_tokenizer(config: RunConfig, target: Path) -> None:
    """The run's tokenizer: the given one, the text tower's own, or one trained on the captions."""
    from univitar_ds.data.shards.sources import iterate_captions
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.tokenization import load_tokenizer, train_tokenizer

    text = config.model.text
    given = Path(text.tokenizer) if text.tokenizer else Path(text.path, TOKENIZER) if text.path else None
    if given:
        load_tokenizer(given)  # refuses a missing or broken file before anything starts
        with replacing(target) as partial:
            shutil.copyfile(given, partial)
        return
    settings = StorageSettings.of(config.data)
    captions = iterate_captions(config.data.sources, limit=CAPTIONS_FOR_TOKENIZER, settings=settings)
    replace_text(target, train_tokenizer(captions, text.vocab_size).to_str(pretty=True))


def _report_unused(config: RunConfig) -> None:
    for sentence in unused_parts(config):
        logger.warning("%s", sentence)


def _check_sources(config: RunConfig) -> None:
    """Raises: DataError if a source of training or evaluation is missing, or holds nothing for it."""
    from univitar_ds.data.shards.contents import check_contents
    from univitar_ds.data.shards.sources import find_shards, validate_sources
    from univitar_ds.data.storage.base import StorageSettings

    settings = StorageSettings.of(config.data)
    shards = validate_sources(config.data.sources, config.stages, settings)
    try:
        evaluation = find_shards(config.evaluation.sources, settings)
    except DataError as error:
        raise DataError(f"evaluation.sources: {error}") from error
    check_contents(config, shards, evaluation)


def _check_teacher(config: RunConfig) -> None:
    """Reads the teacher's configuration before anything starts, so that an unsupported model is refused here."""
    if config.objective.teacher is not None:
        from univitar_ds.model.teacher.teacher import read_teacher

        read_teacher(config.objective.teacher)


def _check_text_library() -> None:
    """Raises: InstallationError if this environment cannot build the text tower, before a folder is made for a run."""
    from univitar_ds.model.towers import check_text_library

    check_text_library()
