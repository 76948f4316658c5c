"""Writes the features of files and shards: the command `univitar-ds embed`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from univitar_ds import startup
from univitar_ds.config.data import CacheConfig, DataConfig, S3Config, SourceConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling
from univitar_ds.data.shards.sources import stage_modalities
from univitar_ds.data.storage.base import S3, StorageSettings
from univitar_ds.data.storage.session import session_folder
from univitar_ds.formats.recognise import local_folder
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import HEADS, StoredModel
from univitar_ds.inference.reading import FRAMES, Kind, Reading, Rows
from univitar_ds.inference.sources import (
    Place,
    Position,
    count_items,
    find_places,
    fingerprint_of,
    length_of,
    units,
)
from univitar_ds.inference.workers import AnySetup, Setup, compute, device_of, open_as
from univitar_ds.inference.writing.destination import FORMAT, Destination, FinishedPart, add_rows
from univitar_ds.model.placement import feature_dtype
from univitar_ds.screen import progress_bar
from univitar_ds.training.distributed.process_group import check_gpus, uses_cuda

TOKEN_BUDGET = 16384
"""Default maximum number of tokens of a pack."""
PART_ROWS, PART_ROWS_OF_TOKENS = 100_000, 1_000
"""Default number of items of a part, for vectors and for tokens, which take about a thousand times the space."""
_UNIT_ITEMS = {"tokens": 32}
_UNIT_ITEMS_OF_VECTORS = 256
"""Maximum number of items of a unit of work. A pack has items of one unit."""
_MOST_WORKERS = 8
AnyReading = TypeVar("AnyReading")
"""`Reading`, or another dataclass with `data` and `remote`."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is opened and run, and how its items are read.

    `frames`: number of frames of a video; None: as in the run's configuration, else 8. `workers`: decoding processes of
    each process. `s3`: settings of the S3 store, instead of those of a run. `dtype`: None: bfloat16 on a GPU, else as
    stored.
    """

    weights: Weights | None = None
    dtype: torch.dtype | None = None
    token_budget: int = TOKEN_BUDGET
    frames: int | None = None
    nproc: int | None = None
    workers: int | None = None
    s3: S3Config = field(default_factory=S3Config)


@dataclass(frozen=True)
class EmbedOptions:
    """Options of the result. `tokens`: all tokens instead of one vector per item; `part_rows`: maximum number of items
    of a part, None for the default; `split`: split of packed folders, None for all; `progress`: whether to show a
    progress bar on stderr."""

    tokens: bool = False
    part_rows: int | None = None
    split: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Opened:
    """A stored model, the settings with which processes compute its features, and the number of processes."""

    stored: StoredModel
    setup: Setup
    nproc: int


def embed_files(
    model: str, sources: Sequence[str], out: Path, options: EmbedOptions, how: ModelOptions
) -> tuple[int, str]:
    """Writes the features of all items of the sources. Continues where an earlier call with the same arguments ended.

    Returns: the number of rows, and a sentence about the result.
    Raises: CheckpointError, ConfigError, DataError or StorageError.
    """
    destination = Destination(out)
    opened = open_for_files(model, how, tokens=options.tokens)
    settings = StorageSettings.of(opened.setup.reading.data)
    places = find_places(sources, settings, split=options.split)
    setup = replace(opened.setup, reading=for_places(opened.setup.reading, places))
    part_rows = options.part_rows or (PART_ROWS_OF_TOKENS if options.tokens else PART_ROWS)
    about = settings_of(opened.stored, setup, places, part_rows)
    if (rows := destination.completed(about)) is not None:
        return rows, f"{out} is already complete; index {destination.index}"
    with destination.opened(about) as done:
        write_parts(destination, done, setup, opened.nproc, (places, part_rows, "embed" if options.progress else None))
        return _summary(destination, *destination.complete())


def open_for_files(model: str, how: ModelOptions, *, tokens: bool = False) -> Opened:
    """Opens a model and determines how items are read: with the configuration of its run, else with the defaults.

    Raises: CheckpointError if the model cannot be opened; ConfigError if options do not fit it, or there are too few
        GPUs.
    """
    startup.phase("opening the model")
    nproc = processes_of(how)
    folder = str(model_folder(model, how))
    stored = open_as(folder, how.weights, how.dtype)
    if stored.format == "run":  # names the checkpoint, since training may write a later one meanwhile
        folder = str(stored.path)
    recipe = recipe_of(stored)
    data = data_settings(how, nproc, None if recipe is None else recipe.data)
    frames, sampling = _frames(recipe, how.frames)
    reading = Reading(stored.encoder, data, how.token_budget, frames, sampling)
    kind: Kind = "tokens" if tokens else "mean" if stored.joint is None else "embedding"
    return Opened(stored, Setup(folder, how.weights, how.dtype, kind, reading), nproc)


def recipe_of(stored: StoredModel) -> RunConfig | None:
    """Returns the configuration of the run that a stored model is from; None for other models."""
    return stored.origin.get("recipe") if stored.format == "run" else None


def processes_of(how: ModelOptions) -> int:
    """Returns the number of processes: `how.nproc`, else one per GPU, or one on the CPU.

    Raises: ConfigError if there are too few GPUs."""
    nproc = how.nproc or (torch.cuda.device_count() if uses_cuda() else 1)
    check_gpus(nproc)
    return nproc


def model_folder(model: str, how: ModelOptions) -> Path:
    """Returns the local folder of a model. Raises: as `local_folder`."""
    return local_folder(model, StorageSettings.of(_no_data(how.s3)))


def data_settings(how: ModelOptions, nproc: int, data: DataConfig | None) -> DataConfig:
    """Returns limits, workers and storage for reading items. Args: data: of a run; None: the defaults."""
    data = data or _no_data()
    cores = len(os.sched_getaffinity(0))
    given = {name: value for name, value in how.s3.model_dump().items() if name in how.s3.model_fields_set}
    changes: dict[str, Any] = {
        "workers": how.workers or max(1, min(cores // nproc - 1, _MOST_WORKERS)),
        "prefetch_packs": None,
        "worker_restarts": 1 << 30,  # files that crash their process are left out, without a limit
        "s3": data.s3.model_copy(update=given),
        "cache": CacheConfig(),  # reading all data would evict the shards of a run
    }
    return data.model_copy(update=changes)


def _frames(recipe: RunConfig | None, frames: int | None) -> tuple[int, Sampling]:
    """Returns number and sampling of the frames of a video: `frames` sampled uniformly if it is given; else those of
    the last stage of the run that reads videos, or the defaults without a run."""
    if frames is not None or recipe is None:
        return FRAMES if frames is None else frames, UNIFORM
    stages = [stage for stage in recipe.stages if "video" in stage_modalities(stage)] or recipe.stages
    sampling = stages[-1].video_sampling
    return stages[-1].video_frames, Sampling(sampling.kind, sampling.fps)  # without jitter, which is for training


def for_places(reading: AnyReading, places: Sequence[Place]) -> AnyReading:
    """Returns `reading` with a shard cache that all processes share, if a place is on S3; else `reading` itself."""
    paths = [place[0] if isinstance(place, tuple) else place.path for place in places]
    files = [path for place in places if isinstance(place, tuple) for path in place]
    if not any(path.startswith(S3) for path in (*paths, *files)):
        return reading
    cache = CacheConfig(folder=os.path.join(session_folder(), "shards"))
    return replace(reading, data=reading.data.model_copy(update={"cache": cache}), remote=True)


def _no_data(s3: S3Config | None = None) -> DataConfig:
    return DataConfig(sources=[SourceConfig(path="none")], s3=s3 or S3Config())


def settings_of(
    stored: StoredModel, setup: Setup, places: Sequence[Place], part_rows: int, digest: str | None = None
) -> dict[str, Any]:
    """Returns everything that determines the result, by the names that messages use.

    Args: digest: `digest_of` the model, if it is known.
    """
    reading = setup.reading
    dtype = feature_dtype(device_of(0)) if setup.dtype is None else setup.dtype
    return {
        "format": FORMAT,
        "features": setup.kind,
        "width": _width(stored, setup.kind),
        "model": digest or digest_of(stored),
        "dtype": None if dtype is None else str(dtype),
        "sources": fingerprint_of(places, StorageSettings.of(reading.data)),
        "part_rows": part_rows,
        **reading_settings(reading),
    }


def reading_settings(reading: Any) -> dict[str, Any]:
    """Returns the settings of a `Reading` that determine the result, by the names that messages use."""
    data = reading.data
    sampling = reading.sampling
    part = (sampling.part, sampling.parts) if sampling.parts > 1 else None
    given = {"resolution": reading.resolution, "modality": reading.only, "crop": reading.crop, "part": part}
    return {
        "token_budget": reading.token_budget,
        "frames": [reading.frames, sampling.kind, sampling.fps, sampling.jitter],
        "limits": [data.max_image_px, data.max_sample_mb, data.max_video_s, data.decode_timeout_s],
        **{name: str(value) for name, value in given.items() if value is not None},
    }


def _width(stored: StoredModel, kind: Kind) -> int:
    return stored.joint.embed_dim if kind == "embedding" and stored.joint else stored.encoder.hidden_size


def digest_of(stored: StoredModel) -> str:
    """Returns a hash of the model's weights and configuration."""
    state = hashlib.blake2b(repr(stored.encoder).encode(), digest_size=16)
    for name in sorted(stored.tensors):
        if not name.startswith(HEADS):
            state.update(name.encode())
            state.update(_bytes(stored.tensors[name]))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def write_parts(
    destination: Destination, done: int, setup: AnySetup, nproc: int, what: tuple[Sequence[Place], int, str | None]
) -> None:
    """Writes all parts from number `done` on.

    Args: what: places, items of a part, and the title of the progress bar, None for no bar."""
    places, part_rows, title = what
    start, seen = destination.after(done, [length_of(place) for place in places]), 0
    for number in range(done):
        about = destination.part(number)
        seen += len(set(about.keys)) + len(about.left_out)
    coming = units(places, part_rows, _UNIT_ITEMS.get(setup.kind, _UNIT_ITEMS_OF_VECTORS), start, done)
    with progress_bar(total=count_items(places), initial=seen, desc=title or "", unit="item", disable=not title) as bar:
        first = next(coming, None)
        if first is None:
            return
        found = compute(setup, _chained(first, coming), nproc, bar.update)
        with closing(found):
            for number, rows in groupby(found, key=lambda one: one.unit.part):
                _write_part(destination, number, setup, rows)


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _write_part(destination: Destination, number: int, setup: AnySetup, rows: Iterator[Rows]) -> None:
    part = None
    about = FinishedPart(destination.name_of(number), Position())
    try:
        for unit in rows:
            if part is None:
                part = destination.begin(number, setup.kind, unit.values.shape[1])
            add_rows(part, about, unit)
        assert part is not None
        destination.finish(number, part, about)
    except BaseException:
        if part is not None:
            part.drop()
        raise


def _summary(destination: Destination, parts: int, rows: int, bad: int) -> tuple[int, str]:
    first, last = destination.name_of(0), destination.name_of(parts - 1)
    names = first if parts == 1 else f"{first} to {last}"
    left_out = f"; {bad} left out, listed in {destination.report}" if bad else ""
    return rows, f"{rows} rows in {names}, index {destination.index}{left_out}"
