"""The run file and what it names: configurations, lanes, sources, teacher, text tower, start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from univitar_ds.config.deepspeed import AUTO, packs_per_rank, read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import load_config
from univitar_ds.config.paths import expand
from univitar_ds.config.run_folder import CONFIG
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.divisors import divisors
from univitar_ds.doctor.findings import OK, SKIPPED, Found, Row, from_error, listed
from univitar_ds.doctor.scene import Check, Scene
from univitar_ds.errors import UserError
from univitar_ds.model.config import encoder_config
from univitar_ds.model.teacher.teacher import build_teacher
from univitar_ds.model.towers import build_text_tower
from univitar_ds.planning import checks
from univitar_ds.planning.checks import Inputs
from univitar_ds.planning.counts.batch import kept_checkpoints
from univitar_ds.planning.counts.samples import expected_tokens
from univitar_ds.planning.sizes import checkpoint_bytes, count_parameters
from univitar_ds.tokenization import load_tokenizer, special_ids

NAME = "run file"


def rows_of(scene: Scene) -> list[Row]:
    """Reads the run file. Fills `config` of the scene."""
    if scene.recipe is None:
        return [Row(NAME, SKIPPED, "none given; --config RUN checks its sources, models and folder too")]
    rows: list[Row] = []
    scene.config = _tried(rows, NAME, lambda: load_config(scene.recipe, scene.overrides))
    if scene.config is not None:
        stages = listed([stage.name for stage in scene.config.stages])
        rows.append(Row(NAME, OK, f"{scene.recipe} is valid; its stages: {stages}"))
    return rows


def rows_of_parts(scene: Scene) -> list[Row]:
    """Reads what the run file names. Fills `shards`, `checkpoint_bytes` and `checkpoints` of the scene."""
    config, rows = scene.config, []
    if config is None:
        return rows
    steps: dict[str, Callable[[], str | None]] = {
        "installation": lambda: _installation(config),
        "plugins": lambda: checks.check_plugins(config),
        "lanes": lambda: _lanes(config, scene),
        "deepspeed": lambda: _deepspeed(config, scene),
    }
    for name, check in steps.items():
        if text := _tried(rows, name, check):
            rows.append(Row(name, OK, text))
    _models(scene, config, rows)
    _sources(scene, config, rows)
    return rows


def _tried(rows: list[Row], name: str, check: Callable[[], Any]) -> Any:
    """Returns the result of a check; after a UserError adds its rows and returns None."""
    try:
        return check()
    except UserError as error:
        rows += from_error(name, error)
        return None


def _installation(config: RunConfig) -> str:
    checks.check_libraries(config)
    return "the packages of this run are installed"


def _lanes(config: RunConfig, scene: Scene) -> str:
    lanes, size = config.data.lanes, scene.ranks.size
    each, sharing = packs_per_rank(config, size), config.model.tensor_parallel * config.model.sequence_parallel
    fitting = ", ".join(str(count * sharing) for count in divisors(lanes))
    return f"data.lanes = {lanes} fits {size} rank{'' if size == 1 else 's'}, {each} for each; it fits {fitting} ranks"


def _deepspeed(config: RunConfig, scene: Scene) -> str:
    if config.deepspeed == AUTO:
        return "auto: chosen when the run starts, see train --dry-run"
    content = read_deepspeed(config.deepspeed)
    stage = checks.check_zero_stage(content, config.deepspeed)
    resolve_deepspeed(config, scene.ranks.size, content, (str(scene.recipe), config.deepspeed))
    return f"{config.deepspeed}: ZeRO-{stage}"


def _models(scene: Scene, config: RunConfig, rows: list[Row]) -> None:
    """Adds rows about teacher, text tower and `model.init_from`, and computes the size of a checkpoint."""
    before = len([row for row in rows if row.state != OK])
    teacher = _tried(rows, "teacher", lambda: _teacher(config, rows))
    start = None
    if scene.run is None:  # a run has its own copy of the tokenizer and of the start weights
        start = _tried(rows, "model.init_from", lambda: checks.open_start(config))
        if start is not None or config.model.init_from is None:
            _tried(rows, "model", lambda: checks.check_shapes(config, start, scene.ranks.size))
        _tried(rows, "text tower", lambda: _text(config, rows))
    if start is not None:
        rows.append(Row("model.init_from", OK, f"{config.model.init_from} fits the model of the run"))
    if len([row for row in rows if row.state != OK]) > before:
        return
    found = Inputs(config, {}, {}, (), (), start, teacher)
    scene.checkpoint_bytes = _tried(rows, "model", lambda: _checkpoint(scene, found))


def _teacher(config: RunConfig, rows: list[Row]) -> Any:
    """Loads the teacher into host memory once, to see that it loads."""
    shape = checks.check_teacher(config)
    if shape is None:
        return None
    begin = time.monotonic()
    alone = config.objective.teacher.model_copy(update={"partitioned": False, "cache": None})
    build_teacher(alone, merge=1, device=torch.device("cpu"))
    took = time.monotonic() - begin
    text = f"{alone.path}: {shape.kind} of width {shape.width} loads"
    rows.append(Row("teacher", OK, text, numbers={"load_s": round(took, 2)}))
    return shape


def _text(config: RunConfig, rows: list[Row]) -> None:
    checks.check_text(config)
    text, given = config.model.text, checks.given_tokenizer(config)
    if config.objective.classifies or given is None or config.model.init_part == "model":
        return
    special = special_ids(load_tokenizer(given))
    where = f"the tokenizer {given}"
    if text.path is not None:
        build_text_tower(text, **special.of_text_model)
        where += f" and the weights of {text.path}"
    rows.append(Row("text tower", OK, f"{where} load"))


def _checkpoint(scene: Scene, found: Inputs) -> int:
    """Returns the bytes of the largest checkpoint; frozen weights are counted in float32."""
    config = found.config
    if scene.run is not None:
        description, classes = checks.saved_model(scene.run, config)
    else:
        description, classes = checks.foreseen_model(found)
    width = None if found.teacher is None else found.teacher.width
    counts = count_parameters(config, description, teacher_width=width, classes=classes)
    return max(checkpoint_bytes(config, stage, counts, {}) for stage in config.stages)


def _sources(scene: Scene, config: RunConfig, rows: list[Row]) -> None:
    packed = _tried(rows, "sources", lambda: with_packed_sources(config, pack=False))
    found = None if packed is None else _tried(rows, "sources", lambda: checks.check_sources(packed))
    if found is None:
        return
    scene.config, (scene.shards, evaluation) = packed, found
    scene.checkpoints = kept_checkpoints(packed, encoder_config(packed.model), expected_tokens(packed, scene.shards))
    plural = "" if len(packed.data.sources) == 1 else "s"
    text = f"{len(scene.shards)} shards of {len(packed.data.sources)} source{plural} fit the stages"
    rows.append(Row("sources", OK, text + (f", {len(evaluation)} of the evaluation" if evaluation else "")))


def take_run(scene: Scene) -> None:
    """If the folder of a run was given instead of a run file, sets `run` and takes the run file in it."""
    folder = None if scene.recipe is None else Path(expand(scene.recipe))
    if folder is not None and folder.is_dir():
        scene.run, scene.recipe = folder, str(folder / CONFIG)


def _look(scene: Scene) -> Found:
    return Found(rows_of(scene))


def _look_at_parts(scene: Scene) -> Found:
    return Found(rows_of_parts(scene))


CHECK = Check(NAME, _look, "the disk with the run file does not answer on this node")
PARTS_CHECK = Check(NAME, _look_at_parts, "a disk, store or hub that the run file names does not answer on this node")
