"""Builds a run's model under DeepSpeed and loads the last checkpoint: at launch, at a stage transition, and after a
rollback."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from univitar_ds import startup
from univitar_ds.classes import ClassList
from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.config.load import before_extension, changed_result, check_config
from univitar_ds.config.run_folder import CHECKPOINTS, CLASSES, CONFIG, DEEPSPEED, START, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.storage.session import session_folder
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.formats.elastic import STATE, read_state, read_updates
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.run import run_description
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.kernels.dispatch import compile_on_cpu
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.classification import ClassificationModel, build_classifier
from univitar_ds.model.config import compiles
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.teacher.teacher import read_teacher
from univitar_ds.plugins import compare_with_saved
from univitar_ds.tokenization import load_tokenizer, special_ids
from univitar_ds.training.checkpoint.sharded import load_checkpoint
from univitar_ds.training.distributed.groups import Groups, groups_of
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, broadcast_json
from univitar_ds.training.engine.engine import Engine, build_engine
from univitar_ds.training.engine.optim import freeze_but, trained_parts
from univitar_ds.training.fp8 import use_fp8
from univitar_ds.training.state import State
from univitar_ds.training.step.curriculum import Progress

logger = logging.getLogger(__name__)


def build_training(cfg: RunConfig, run: Path, world: World) -> tuple[Engine, State]:
    """Returns the engine of the run's current stage, and the state of the last checkpoint (the initial state without a
    checkpoint).

    All ranks call it; the caller closes the engine.
    Raises: CheckpointError if the checkpoint is damaged or was written with another configuration, PeerFailure on a
        rank that found no error.
    """
    startup.phase("building the model")
    groups = groups_of(cfg, world)
    with _last_checkpoint(cfg, run, world) as last:
        return _build(cfg, run, groups, last)


def _build(cfg: RunConfig, run: Path, groups: Groups, last: _Last) -> tuple[Engine, State]:
    world, folder = groups.world, last.folder
    with all_ranks_or_none(world):
        compile_on_cpu(compiles(cfg.model))
        saved = _read_saved(cfg, run, last) if folder else {**State().to_dict(), "updates": 0}
        progress = Progress(**saved["progress"])
        stage = cfg.stages[min(progress.stage, len(cfg.stages) - 1)]
        parts = trained_parts(cfg, stage)
        began = {part: saved["began"].get(part, saved["updates"]) for part in parts}
        start = _start(cfg, run) if folder is None else None
        model = _build_model(cfg, run, start, run_description(run, cfg, saved.get("model")))
        prepare_model(model, cfg, stage, groups)
        content = json.loads((run / DEEPSPEED).read_text(encoding="utf-8"))
        ds_config = resolve_deepspeed(cfg, world.size, content, (str(run / CONFIG), str(run / DEEPSPEED)))
    startup.phase("building DeepSpeed's engine")
    engine = build_engine(model, cfg.optimizer, ds_config, world, began, groups)
    if folder is None:
        return engine, State(began=began)
    startup.phase(f"loading the checkpoint {last.place}")
    try:
        stage_transition = saved["began"].keys() != began.keys()
        saved_now = load_checkpoint(engine, folder, stage_transition=stage_transition, fetch=last.fetch)
        state = State.from_checkpoint(saved_now)
    except Exception:
        engine.close()
        raise
    state.began = began
    if world.is_main:
        _report_resume(last.place, saved["threads"])
        for sentence in compare_with_saved(saved.get("plugins", ())):
            logger.warning("%s", sentence)
    return engine, state


def _start(cfg: RunConfig, run: Path) -> StoredModel | None:
    """Opens the weights that a new run starts from: the run's own copy, or what `model.init_from` names."""
    if cfg.model.init_from is None:
        return None
    source = run / START if (run / START).is_dir() else cfg.model.init_from
    return open_stored(source, verify=False)  # `create_run` has verified it, once for all ranks


def _build_model(
    cfg: RunConfig, run: Path, start: StoredModel | None, description: Mapping[str, Any]
) -> ContrastiveModel | ClassificationModel:
    teacher = cfg.objective.teacher
    given = {
        "seed": cfg.seed,
        "teacher_width": None if teacher is None else read_teacher(teacher).width,
        "start": start,
        "description": description,
    }
    if cfg.objective.classifies:
        return build_classifier(cfg.model, classes=len(ClassList.read(run / CLASSES)), **given)
    special = special_ids(load_tokenizer(run / TOKENIZER))
    return build_contrastive(cfg.model, **special.of_text_model, **given)


def prepare_model(
    model: ContrastiveModel | ClassificationModel, cfg: RunConfig, stage: StageConfig, groups: Groups
) -> None:
    """Prepares a model on the CPU for the engine of a stage, in place.

    The weights of the encoder are replaced by this rank's tensor-parallel slices. The encoder gets the group that
    shares packs. Parts that the stage does not train are frozen. With `model.fp8`, matrix products are converted.
    """
    if groups.tensor.size > 1:
        from univitar_ds.model.blocks.tensor_parallel import split_encoder  # imports Megatron-Core, which takes seconds

        split_encoder(model.vision, groups.tensor)
    model.vision.sequence = groups.sequence
    freeze_but(model, trained_parts(cfg, stage))
    if cfg.model.fp8:
        use_fp8(model)


class _Last(NamedTuple):
    """The last checkpoint of a run, if it has one.

    For a checkpoint on S3, `fetch` downloads a file into `folder` and returns its path."""

    folder: Path | None = None
    place: str | Path = ""
    fetch: Callable[[str], Path] | None = None


@contextmanager
def _last_checkpoint(cfg: RunConfig, run: Path, world: World) -> Iterator[_Last]:
    """Yields the last checkpoint. Files that were downloaded from S3 are removed after the body.

    Rank 0 chooses the checkpoint for all ranks, since a shared disk may not show it to all ranks at the same time."""
    name, store = None, store_of(cfg)
    with all_ranks_or_none(world):
        if world.is_main and store is not None:
            name = store.latest()
        elif world.is_main and (folder := checkpoint_dir.latest(run / CHECKPOINTS)):
            name = folder.name
    name = broadcast_json(name, world)
    if name is None:
        yield _Last()
    elif store is None:
        yield _Last(run / CHECKPOINTS / name, run / CHECKPOINTS / name)
    else:
        with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=session_folder()) as copies:
            with all_ranks_or_none(world):
                stored = store.checkpoint(name, Path(copies))
                stored.fetch(STATE)
            yield _Last(stored.folder, stored.url, stored.fetch)


def _read_saved(cfg: RunConfig, run: Path, last: _Last) -> dict:
    """Returns the state of the run in a checkpoint, without tensors and cursors, and the number of optimizer updates,
    which excludes steps whose update was skipped.

    Raises: CheckpointError if the checkpoint cannot be read, or if a key that affects the result differs from `cfg`."""
    saved = {**read_state(last.folder), "updates": read_updates(last.folder)}
    before = check_config(saved["config"], str(last.place))
    changed = changed_result(before, before_extension(before, cfg))
    if changed:
        raise CheckpointError(
            f"{last.place} was written with another configuration ({', '.join(changed)} differ); restore "
            f"{run / CONFIG}, or start a new run under another name"
        )
    return saved


def _report_resume(folder: str | Path, threads: int) -> None:
    logger.info("resuming from %s", folder)
    if threads != torch.get_num_threads():
        logger.warning(
            "%d threads now, %d when the checkpoint was written: results will be equal up to rounding, not bitwise",
            torch.get_num_threads(),
            threads,
        )
