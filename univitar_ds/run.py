"""The folder of a run: created once from a run file, and reopened by every later launch.

The process that the user started, or rank 0 under a launcher, creates the folder. All ranks then read from it.
The content of the folder is the only state of a run.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import yaml

from univitar_ds import startup
from univitar_ds.atomic_write import replace_bytes, replace_text, replacing
from univitar_ds.config.deepspeed import AUTO
from univitar_ds.config.keys.places import anchored
from univitar_ds.config.keys.unused import unused_parts
from univitar_ds.config.load import changed_result, dump_config, dumped, extended, load_config
from univitar_ds.config.run_folder import (
    CHECKPOINTS,
    CLASSES,
    CONFIG,
    DEEPSPEED,
    DESCRIPTION,
    EVALUATION,
    EXPORT,
    LOCKS,
    REPLACED,
    RUN_ENTRIES,
    START,
    TOKENIZER,
    not_a_run,
)
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import ConfigError, Faults, writing
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.formats.stored_model import JointConfig, StoredModel
from univitar_ds.owned import clear, foreign, is_marked, mark, refuse_link
from univitar_ds.planning.checks import (
    Inputs,
    check_lengths,
    check_reopened,
    check_run,
    check_teacher,
    existing_parent,
    find_classes,
    foreseen_model,
    given_tokenizer,
    saved_model,
)
from univitar_ds.plugins import compare_with_saved
from univitar_ds.run_lock import RunLock

logger = logging.getLogger(__name__)

CAPTIONS_FOR_TOKENIZER = 200_000
"""Maximum number of captions that a tokenizer is trained on; more captions change it little."""
KIND = "run"
"""Kind of the marker file in the folder of a run."""


def create_run(config: RunConfig, recipe: str, world_size: int, lock: RunLock | None = None) -> Path:
    """Creates the run's folder with resolved config, DeepSpeed JSON and tokenizer. Returns the folder.

    Replaces only files that an earlier launch without a checkpoint left in the folder. If this launch is a restart of
    the job that last used the folder, and the folder has a checkpoint, the run is reopened. Sources that are not
    shards are packed.

    Args: lock: lock of the folder, acquired here and kept. None: a lock is acquired and released here.
    Raises: ConfigError if the folder contains checkpoints, results or files that no run writes, or if the
        configurations contradict each other; CheckpointError if the teacher or model.init_from cannot be used;
        RunLocked if another launch has the lock; DataError if the sources cannot feed the stages; InstallationError if
        the text tower cannot be built in this environment; StorageError if the folder cannot be written.
    """
    run = Path(config.output, config.name)
    with writing(run), _held(run, lock) as lock:
        lock.refuse()
        if lock.continues() and (_stored_before(config) or checkpoint_dir.latest(run / CHECKPOINTS) is not None):
            return reopen_run(run, (), world_size, lock)
        _check_new(run, config, recipe)
        check_lengths(run)
        found = check_run(config, recipe, world_size, pack=True)
        _report_unused(found.config)
        _report_choice(found, run)
        config, start, joint = found.config, found.start, found.joint
        run.mkdir(parents=True, exist_ok=True)
        lock.take()
        _check_unused(run, recipe)  # another launch may have written here since
        clear(run, REPLACED)
        mark(run, KIND)
        dump_config(anchored(config), run / CONFIG)
        _write_deepspeed(run, found.deepspeed)
        if config.objective.classifies:
            _provide_classes(config, run / CLASSES)
        else:
            _provide_tokenizer(config, run / TOKENIZER, joint)
        _write_description(config, run, start)
    return run


def reopen_run(
    run: Path,
    overrides: Sequence[str],
    world_size: int,
    lock: RunLock | None = None,
    extension: Sequence[str] | None = None,
) -> Path:
    """Checks that the run in folder `run` can continue with `overrides`, and stores them. Returns the folder.

    Args: lock: as in `create_run`; extension: overrides that define one more stage, see `load.extended`; None: no
        further stage.
    Raises: ConfigError if the folder has no run or an override would change the run's result; RunLocked if another
        launch has the lock; DataError if a source no longer exists; InstallationError if the text tower cannot be
        built in this environment; StorageError if the folder cannot be written.
    """
    _check_is_run(run)
    with writing(run), _held(run, lock) as lock:
        lock.take()
        after, named = _reopened(run, overrides, extension)
        found = check_reopened(after, named, world_size, str(run / CONFIG), pack=True)
        after = found.config
        _report_unused(after)
        _report_choice(found, run)
        mark(run, KIND)  # folders of earlier versions have no marker file
        dump_config(anchored(after), run / CONFIG)
        _write_deepspeed(run, found.deepspeed)
    return run


def describe_run(config: RunConfig, recipe: str, world_size: int) -> str:
    """Returns what `create_run` and the training would do, as text, after the same checks. Writes nothing.

    Raises: as `create_run`, and ConfigError if the disk has too little space for the checkpoints. An earlier run in the
        folder and errors of the run file are reported together.
    """
    from univitar_ds.planning.report import Plan, report

    run, faults = Path(config.output, config.name), Faults()
    with writing(run), RunLock(run) as lock:
        lock.refuse()
        faults.of(_check_new, run, config, recipe)
        check_lengths(run)
        parent = existing_parent(run)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
    found = faults.of(check_run, config, recipe, world_size)
    faults.raise_all()
    assert found is not None
    described, classes = foreseen_model(found)
    return report(Plan(found, run, world_size, described, classes))


def describe_resumed(run: Path, overrides: Sequence[str], world_size: int, extension: Sequence[str] | None) -> str:
    """Returns what `reopen_run` and the rest of the training would do, as text. Writes nothing.

    Raises: as `reopen_run`, and ConfigError if there is no checkpoint.
    """
    from univitar_ds.formats.elastic import read_state
    from univitar_ds.formats.run import last_checkpoint
    from univitar_ds.planning.report import Plan, report

    after, named = _reopened(run, overrides, extension)
    found = check_reopened(after, named, world_size, str(run / CONFIG))
    after = found.config
    found = replace(found, teacher=check_teacher(after))
    last = last_checkpoint(run)
    if last is None:
        raise ConfigError(f"{run} has no complete checkpoint; --resume would start the run from the beginning")
    saved = read_state(last)
    for sentence in compare_with_saved(saved.get("plugins", ())):
        logger.warning("%s", sentence)
    progress = saved.get("progress", {})
    described, classes = saved_model(run, after, saved.get("model"))
    return report(
        Plan(found, run, world_size, described, classes, (progress.get("step", 0), progress.get("samples", 0)))
    )


def _stored_before(config: RunConfig) -> str | None:
    """Returns the address of the last checkpoint in the store of a run; None if it has no store or no checkpoint.

    Raises: CheckpointError if the store cannot be read.
    """
    store = store_of(config)
    name = None if store is None else store.latest()
    return None if store is None or name is None else f"{store.url}/{name}"


def _check_store_unused(config: RunConfig) -> None:
    """Raises ConfigError if the store of a new run has a checkpoint; CheckpointError if the store cannot be read."""
    stored = _stored_before(config)
    if stored is not None:
        raise ConfigError(
            f"{stored} is a checkpoint of an earlier run; continue it with `univitar-ds train --resume` and the folder "
            "of that run, choose another name=..., or another checkpoint.folder"
        )


def _check_is_run(run: Path) -> None:
    if not (run / CONFIG).is_file():
        raise ConfigError(not_a_run(run))


def _reopened(run: Path, overrides: Sequence[str], extension: Sequence[str] | None) -> tuple[RunConfig, str]:
    """Returns the configuration with which a run would continue, and the name or path of its DeepSpeed JSON.

    Raises: ConfigError if the folder has no run or an override would change the run's result.
    """
    _check_is_run(run)
    before, after = load_config(run / CONFIG), load_config(run / CONFIG, overrides)
    changed = changed_result(before, after)
    if extension is not None:
        after = extended(after, extension, f"the stage that --extend adds to {run}")
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} would change the result of {run} half-way; "
            "resume without this override, or start a new run under another name"
        )
    if after.checkpoint.folder != before.checkpoint.folder:
        raise ConfigError(
            f"checkpoint.folder is {before.checkpoint.folder or 'null'} in {run}, where the run has its checkpoints; "
            "resume without this override, or start a new run from them with model.init_from"
        )
    kept = after.deepspeed == before.deepspeed != AUTO
    return after, str(run / DEEPSPEED) if kept else after.deepspeed


@contextmanager
def _held(run: Path, lock: RunLock | None) -> Iterator[RunLock]:
    """Yields the caller's lock, which is kept, or a new one that is released after the body."""
    if lock is not None:
        yield lock
        return
    with RunLock(run) as own:
        yield own


def _check_new(run: Path, config: RunConfig, recipe: str) -> None:
    """Raises as `_check_unused` and `_check_store_unused`."""
    _check_unused(run, recipe)
    _check_store_unused(config)


def _check_unused(run: Path, recipe: str) -> None:
    """Raises ConfigError unless the folder is missing or has only files of launches that wrote no checkpoint."""
    if run.is_symlink() and not run.exists():
        raise ConfigError(f"{run} is a broken symbolic link; remove the link, or choose another name=...")
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; choose another name=... or output=...")
    if not run.exists() or foreign(run, LOCKS) is None:
        return
    refuse_link(run)
    if checkpoint_dir.latest(run / CHECKPOINTS) is not None:
        raise ConfigError(
            f"{run} holds the checkpoints of an earlier run; continue it with `univitar-ds train --resume {run}`, "
            "choose another name=..., or remove the folder"
        )
    if (run / CONFIG).is_file():
        try:
            earlier = load_config(run / CONFIG)
        except ConfigError:  # of another program, or of another version
            earlier = None
        if earlier is not None:
            _check_store_unused(earlier)
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
    """Whether an earlier version created this folder without a marker file, judged by its config.yaml."""
    try:
        text = (run / CONFIG).read_text(encoding="utf-8")
        return dumped(yaml.safe_load(text)) == text and load_config(run / CONFIG).name == run.name
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ConfigError):
        return False


def _write_deepspeed(run: Path, content: dict) -> None:
    replace_text(run / DEEPSPEED, json.dumps(content, indent=2) + "\n")


def _write_description(config: RunConfig, run: Path, start: StoredModel | None) -> None:
    """Writes the configurations of the towers, and a copy of the initial weights if they are not in a folder.

    Raises: CheckpointError or ConfigError if the run's model cannot start from `start`.
    """
    from univitar_ds.convert.conversion import write
    from univitar_ds.model.build import describe, described_encoder
    from univitar_ds.tokenization import load_tokenizer, special_ids

    startup.phase("describing the model")
    if config.objective.classifies:
        described = {"encoder": described_encoder(config.model, start).to_dict()}
    else:
        special = special_ids(load_tokenizer(run / TOKENIZER))
        described = describe(config.model, start, **special.of_text_model)
    replace_text(run / DESCRIPTION, json.dumps(described, indent=2) + "\n")
    if start is not None and not Path(str(config.model.init_from)).is_dir():
        whole = config.model.init_part == "model"
        logger.info("copying %s to %s", config.model.init_from, run / START)
        write(start if whole else start.encoder_only(), run / START, "hf" if whole else "release")


def _provide_tokenizer(config: RunConfig, target: Path, joint: JointConfig | None) -> None:
    """Writes the run's tokenizer.

    It is that of the whole model that the run starts from, else the configured one, else that of the text tower's
    folder, else one that is trained on captions.
    """
    from univitar_ds.data.caption_texts import iterate_captions
    from univitar_ds.data.storage.base import StorageSettings
    from univitar_ds.tokenization import load_tokenizer, train_tokenizer

    if joint is not None:
        replace_bytes(target, joint.tokenizer.encode("utf-8"))
        load_tokenizer(target)
        return
    given = given_tokenizer(config)
    if given:
        load_tokenizer(given)  # rejects a missing or broken file before the training starts
        with replacing(target) as partial:
            shutil.copyfile(given, partial)
        return
    startup.phase("reading captions and training the tokenizer on them")
    settings = StorageSettings.of(config.data)
    captions = iterate_captions(config.data.sources, limit=CAPTIONS_FOR_TOKENIZER, settings=settings)
    replace_text(target, train_tokenizer(captions, config.model.text.vocab_size).to_str(pretty=True))


def _provide_classes(config: RunConfig, target: Path) -> None:
    """Writes the classes of a classification run. Raises: DataError if the sources have no labels to choose from."""
    startup.phase("reading the labels of the sources")
    classes = find_classes(config)
    for name, labels in classes.names.items():
        logger.info("data set %s: %d classes", "without a name" if name is None else name, len(labels))
    classes.write(target)


def _report_choice(found: Inputs, run: Path) -> None:
    """Logs what `deepspeed: auto` chose, and whether a resumed run had another configuration before."""
    if found.choice is None:
        return
    (logger.info if found.choice.fits else logger.warning)("%s", found.choice.line)
    before = None
    with suppress(OSError, ValueError):
        before = json.loads((run / DEEPSPEED).read_text(encoding="utf-8"))
    if before is not None and before != found.deepspeed and (run / CHECKPOINTS).is_dir():
        logger.info("this run had another configuration until now; its checkpoints are read with any")


def _report_unused(config: RunConfig) -> None:
    for sentence in unused_parts(config):
        logger.warning("%s", sentence)
