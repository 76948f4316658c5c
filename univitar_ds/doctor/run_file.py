"""Checks the run file and what it names: DeepSpeed JSON, lanes, sources, teacher, text tower and initial weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from univitar_ds.classes import ClassList
from univitar_ds.config.deepspeed import AUTO, on_disk, packs_per_rank, read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import load_config, shipped_recipes
from univitar_ds.config.paths import expand
from univitar_ds.config.run_folder import CHECKPOINTS, CLASSES, CONFIG, DEEPSPEED, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.tools.survey import Surveys
from univitar_ds.divisors import divisors
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import OK, SKIPPED, Found, Row, from_any, listed
from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.model.config import encoder_config
from univitar_ds.model.teacher.teacher import build_teacher
from univitar_ds.model.towers import build_text_tower
from univitar_ds.planning import checks
from univitar_ds.planning.checks import Inputs
from univitar_ds.planning.counts.batch import kept_checkpoints
from univitar_ds.planning.counts.samples import expected_tokens
from univitar_ds.planning.counts.unpacked import UnpackedShard
from univitar_ds.planning.sizes import checkpoint_bytes, count_parameters
from univitar_ds.tokenization import load_tokenizer, special_ids
from univitar_ds.training.engine.engine import check_disk

NAME, PARTS, FOLDER = "run file", "contents of the run file", "run folder"


def rows_of(context: Context) -> list[Row]:
    """Reads the run file and sets `config` of the context. Returns the rows."""
    if context.recipe is None:
        return [Row(NAME, SKIPPED, "none given; --config RUN checks its sources, models and folder too")]
    rows: list[Row] = []
    context.config = _tried(rows, NAME, lambda: load_config(context.recipe, context.overrides))
    if context.config is not None:
        stages = listed([stage.name for stage in context.config.stages])
        rows.append(Row(NAME, OK, f"{context.recipe} is valid; its stages: {stages}"))
    return rows


def rows_of_parts(context: Context) -> list[Row]:
    """Checks what the run file names, and sets `shards`, `checkpoint_bytes` and `checkpoints` of the context.

    Returns the rows; none if there is no valid run file.
    """
    config, rows = context.config, []
    if config is None:
        return rows
    steps: dict[str, Callable[[], str | None]] = {
        "installation": lambda: _installation(config),
        "plugins": lambda: checks.check_plugins(config),
        "lanes": lambda: _lanes(config, context),
        "deepspeed": lambda: _deepspeed(config, context),
    }
    if context.run is not None:
        steps[FOLDER] = lambda: _folder(config, context.run)
    for name, check in steps.items():
        if text := _tried(rows, name, check):
            rows.append(Row(name, OK, text))
    _models(context, config, rows)
    _sources(context, config, rows)
    return rows


def _tried(rows: list[Row], name: str, check: Callable[[], Any]) -> Any:
    """Calls `check` and returns its result; if it raises an error, adds failed rows to `rows` and returns None."""
    try:
        return check()
    except Exception as error:
        rows += from_any(name, error, "leave out what this row is about, and report it")
        return None


def _installation(config: RunConfig) -> str:
    checks.check_libraries(config)
    return "the packages of this run are installed"


def _folder(config: RunConfig, run: Path) -> str:
    """Reads what a run needs to continue. Files of the last checkpoint are not read, only their sizes."""
    if config.objective.classifies:
        ClassList.read(run / CLASSES)
    else:
        load_tokenizer(run / TOKENIZER)
    read_deepspeed(str(run / DEEPSPEED))
    text = f"{run}: what it needs to continue can be read"
    if config.checkpoint.folder is not None:
        return f"{text}; its checkpoints are in {config.checkpoint.folder}"
    last = checkpoint_dir.latest(run / CHECKPOINTS)
    if last is None:
        return f"{text}; no checkpoint yet"
    faults = []
    for name, entry in checkpoint_dir.read_manifest(last).items():
        size = (last / name).stat().st_size if (last / name).is_file() else 0
        if size != entry["bytes"]:
            faults.append(f"{name} has {size} bytes instead of {entry['bytes']}")
    if faults:
        raise CheckpointError(f"{last} is damaged: {', '.join(faults)}; {checkpoint_dir.remedy(last)}")
    return f"{text}; the files of {last.name} have their sizes"


def _lanes(config: RunConfig, context: Context) -> str:
    lanes, size = config.data.lanes, context.ranks.size
    each, sharing = packs_per_rank(config, size), config.model.tensor_parallel * config.model.sequence_parallel
    fitting = ", ".join(str(count * sharing) for count in divisors(lanes))
    return f"data.lanes = {lanes} fits {size} rank{'' if size == 1 else 's'}, {each} for each; it fits {fitting} ranks"


def _deepspeed(config: RunConfig, context: Context) -> str:
    if config.deepspeed == AUTO:
        return "auto: the configuration is chosen when the run starts, see train --dry-run"
    content = read_deepspeed(config.deepspeed)
    stage = checks.check_zero_stage(content, config.deepspeed)
    resolve_deepspeed(config, context.ranks.size, content, (str(context.recipe), config.deepspeed))
    where = f", optimizer states in {check_disk(content)}" if on_disk(content) else ""
    return f"{config.deepspeed}: ZeRO-{stage}{where}"


def _models(context: Context, config: RunConfig, rows: list[Row]) -> None:
    """Adds rows about teacher, text tower and `model.init_from`, and sets `checkpoint_bytes` if none of them failed."""
    before = len([row for row in rows if row.state != OK])
    teacher = _tried(rows, "teacher", lambda: _teacher(config, rows))
    start = None
    if context.run is None:  # an existing run has copies of the tokenizer and of the initial weights
        start = _tried(rows, "model.init_from", lambda: checks.open_start(config))
        if start is not None or config.model.init_from is None:
            _tried(rows, "model", lambda: checks.check_shapes(config, start, context.ranks.size))
        _tried(rows, "text tower", lambda: _text(config, rows))
    if start is not None:
        rows.append(Row("model.init_from", OK, f"{config.model.init_from} fits the model of the run"))
    if len([row for row in rows if row.state != OK]) > before:
        return
    found = Inputs(config, {}, {}, (), (), start, teacher)
    context.checkpoint_bytes = _tried(rows, "model", lambda: _checkpoint(context, found))


def _teacher(config: RunConfig, rows: list[Row]) -> Any:
    """Loads the teacher into host memory, to check that it can be loaded. Returns its shape, None without a teacher."""
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
    """Loads the tokenizer, and the weights of the text tower if the run file names a folder of them."""
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


def _checkpoint(context: Context, found: Inputs) -> int:
    """Returns the bytes of the largest checkpoint over all stages; frozen weights are counted in float32."""
    config = found.config
    if context.run is not None:
        description, classes = checks.saved_model(context.run, config)
    else:
        description, classes = checks.foreseen_model(found)
    width = None if found.teacher is None else found.teacher.width
    counts = count_parameters(config, description, teacher_width=width, classes=classes)
    return max(checkpoint_bytes(config, stage, counts, {}) for stage in config.stages)


def _sources(context: Context, config: RunConfig, rows: list[Row]) -> None:
    """Adds a row about the sources, and sets `shards` and `checkpoints`; `config` names the packed sources then."""
    surveys = Surveys()
    packed = _tried(rows, "sources", lambda: surveys.packed_before(config))
    found = None if packed is None else _tried(rows, "sources", lambda: checks.check_sources(packed, surveys))
    if found is None:
        return
    context.config, (shards, evaluation) = packed, found
    context.checkpoints = kept_checkpoints(packed, encoder_config(packed.model), expected_tokens(packed, shards))
    context.shards = [shard for shard in shards if not isinstance(shard, UnpackedShard)]
    plural = "" if len(packed.data.sources) == 1 else "s"
    text = f"{len(context.shards)} shards of {len(packed.data.sources)} source{plural} fit the stages"
    if len(context.shards) < len(shards):
        text += "; folders and tables are packed when the run starts"
    rows.append(Row("sources", OK, text + (f", {len(evaluation)} of the evaluation" if evaluation else "")))


def take_run(context: Context) -> None:
    """If `recipe` is the folder of a run, sets `run` to it and `recipe` to the run file in it."""
    file = Path(expand(context.recipe), CONFIG) if context.recipe else None
    try:  # `make demo` makes a folder of a recipe's name, which is no run
        is_run = file and file.parent.is_dir() and (file.is_file() or context.recipe not in shipped_recipes())
    except OSError:  # a name that is too long, or no permission: the check of the run file reports it
        return
    if is_run:
        context.run, context.recipe = file.parent, str(file)


def _check(context: Context) -> Found:
    return Found(rows_of(context))


def _check_parts(context: Context) -> Found:
    return Found(rows_of_parts(context))


CHECK = Check(NAME, _check, "the disk with the run file does not answer on this node")
PARTS_CHECK = Check(PARTS, _check_parts, "a disk, store or hub that the run file names does not answer on this node")
