"""Elastic checkpoints: every rank writes the flat shards that it owns, and any number of ranks reads the ranges that
each rank needs.

    rank00000.safetensors   "<parameter>/<kind>": 1-D; kind is fp32, exp_avg, exp_avg_sq, ema, or frozen
    rank00000.json          pieces: {<parameter>: {shape, start, length, kinds: {<kind>: dtype}}}, cursors of its lanes
    buffers.safetensors     buffers of the model, by name
    state.json              progress and settings of the run, optimizer, number of ranks, versions

DeepSpeed's own formats are not used: the native format loads only on the same number of ranks, and the universal format
restores wrong settings with several optimizer groups and drops frozen parameters and buffers. No file is pickled. Only
`read_full` reads a whole model into one process, for export and evaluation.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.weight_files import save_tensors
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, gather_json
from univitar_ds.training.engine.engine import EMA, FROZEN, MASTER, Engine

FORMAT = 2
STATE = "state.json"
BUFFERS = "buffers.safetensors"
MAX_LISTED = 5
"""Maximum number of parameter names that an error lists."""


@dataclass(frozen=True)
class Saved:
    """The content of a checkpoint except the tensors."""

    state: dict[str, Any]
    cursors: dict[int, dict[str, Any]]
    """Data cursors of all lanes, by lane."""


def save_checkpoint(
    engine: Engine, root: Path, step: int, state: dict[str, Any], cursors: dict[int, dict[str, Any]], keep: int
) -> Path:
    """Writes the training state of all ranks to `root/step-<step>`, and returns that folder. All ranks call it.

    Args:
        state: state of the run, as JSON; the same on all ranks.
        cursors: data cursors of the lanes of this rank.
        keep: number of newest checkpoints to keep.
    Raises: as `atomic_dir.commit`, which also says what a crash leaves.
    """
    world = engine.world

    def write(folder: Path) -> Iterator[Path]:
        yield from _write_rank(engine, folder, cursors)
        if world.is_main:
            yield save_tensors(_buffers(engine.module), folder / BUFFERS)
            content = {"format": FORMAT, "world_size": world.size, "optimizer": engine.optimizer_state(), "run": state}
            yield atomic_dir.write_json(folder / STATE, content)

    return atomic_dir.commit(root, step, write, world, keep)


def _write_rank(engine: Engine, folder: Path, cursors: dict[int, dict[str, Any]]) -> Iterator[Path]:
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for piece in engine.pieces():
        complete = piece.length == math.prod(piece.shape)
        # Only rank 0 writes a frozen parameter that every rank has in full.
        length = 0 if complete and FROZEN in piece.tensors and engine.world.rank else piece.length
        index[piece.name] = {
            "shape": list(piece.shape),
            "start": piece.start,
            "length": length,
            "kinds": {kind: str(tensor.dtype).removeprefix("torch.") for kind, tensor in piece.tensors.items()},
        }
        for kind, tensor in piece.tensors.items():
            if length:
                tensors[f"{piece.name}/{kind}"] = tensor.detach().to("cpu", copy=True)  # views share their storage
    name = f"rank{engine.world.rank:05d}"
    yield save_tensors(tensors, folder / f"{name}.safetensors")
    content = {"pieces": index, "cursors": {str(lane): cursor for lane, cursor in cursors.items()}}
    yield atomic_dir.write_json(folder / f"{name}.json", content)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the persistent buffers on the CPU, by name."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if not isinstance(value, nn.Parameter)
    }


class _Reader:
    """Reads the shards of a checkpoint that any number of ranks has written.

    A file of tensors is opened when it is first needed: on the same number of ranks, each rank opens one file.
    """

    def __init__(self, folder: Path, open_files: ExitStack) -> None:
        self.folder = folder
        self._open_files = open_files
        self.content = _read_json(folder / STATE)
        if self.content.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} has format {self.content.get('format')}, this program reads {FORMAT}; "
                "use the version that wrote it"
            )
        self.cursors: dict[int, dict[str, Any]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, dict[str, str]] = {}
        self._parts: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        """(start, length, rank that wrote it) of each part, by parameter."""
        self._files: dict[int, Any] = {}
        for rank in range(self.content["world_size"]):
            index = _read_json(folder / f"rank{rank:05d}.json")
            self.cursors.update({int(lane): cursor for lane, cursor in index["cursors"].items()})
            for name, entry in index["pieces"].items():
                self.shapes[name] = tuple(entry["shape"])
                if entry["length"]:
                    self.kinds[name] = entry["kinds"]
                    self._parts[name].append((entry["start"], entry["length"], rank))

    def fill(self, name: str, kind: str, start: int, target: Tensor) -> None:
        """Copies elements start, start + 1, ... of a flattened parameter to the 1-D `target`.

        Raises: CheckpointError if elements are missing."""
        stop, filled = start + target.numel(), 0
        for begin, length, rank in sorted(self._parts[name]):
            low, high = max(begin, start + filled), min(begin + length, stop)
            if low < high and low == start + filled:
                source = self._tensors(rank).get_slice(f"{name}/{kind}")[low - begin : high - begin]
                target[low - start : high - start].copy_(source)
                filled = high - start
        if filled < target.numel():
            raise CheckpointError(
                f"{self.folder} has {kind} of {name} up to element {start + filled} only, {stop} are needed; "
                f"{atomic_dir.remedy(self.folder)}"
            )

    def _tensors(self, rank: int) -> Any:
        if rank not in self._files:
            path = self.folder / f"rank{rank:05d}.safetensors"
            self._files[rank] = self._open_files.enter_context(safe_open(path, "pt"))
        return self._files[rank]

    def buffers(self) -> dict[str, Tensor]:
        return load_file(self.folder / BUFFERS)


def load_checkpoint(engine: Engine, folder: Path, *, stage_transition: bool = False) -> Saved:
    """Loads a checkpoint of any number of ranks and any ZeRO stage into `engine`. All ranks call it.

    Args: stage_transition: whether trained and frozen parameters may differ between engine and checkpoint. Parameters
    that are newly trained get moments of 0, and their average starts at their value.
    Raises: CheckpointError on all ranks if a file is damaged or the checkpoint is from another model.
    """
    world = engine.world
    _verify_shared(folder, world)
    with ExitStack() as open_files:
        with all_ranks_or_none(world):
            reader = _Reader(folder, open_files)
            _check_model(engine, reader, stage_transition)
            for piece in engine.pieces():
                for kind, target in piece.tensors.items():
                    source = _source(kind, reader.kinds.get(piece.name, {}))
                    if piece.length and source is None:
                        target.zero_()
                    elif piece.length:
                        reader.fill(piece.name, source, piece.start, target)
            buffers = dict(engine.module.named_buffers())
            for name, value in reader.buffers().items():
                buffers[name].data.copy_(value)
            engine.restore_optimizer_state(reader.content["optimizer"], stage_transition=stage_transition)
        engine.refresh_params()
        return Saved(reader.content["run"], reader.cursors)


def _source(kind: str, saved: Collection[str]) -> str | None:
    """Returns the saved kind from which `kind` is loaded; None if `kind` starts at 0."""
    if kind in saved or not saved:
        return kind
    if kind == FROZEN:
        return MASTER
    return FROZEN if kind in (MASTER, EMA) and FROZEN in saved else None


def read_full(folder: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Returns all parameters and buffers in full, by name, floats as float32. Needs no engine and no other rank.

    Args: averaged: whether to read the average of the weights over updates, if the run keeps one.
    Raises: CheckpointError if a file is damaged.
    """
    atomic_dir.verify(folder, atomic_dir.read_manifest(folder))
    with ExitStack() as open_files:
        reader = _Reader(folder, open_files)
        full = {}
        for name, shape in reader.shapes.items():
            flat = torch.empty(shape, dtype=torch.float32).view(-1)
            kinds = reader.kinds.get(name, {})
            reader.fill(name, FROZEN if FROZEN in kinds else EMA if averaged and EMA in kinds else MASTER, 0, flat)
            full[name] = flat.view(shape)
        buffers = {name: b.float() if b.is_floating_point() else b for name, b in reader.buffers().items()}
        return full | buffers


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the `state` that was passed to `save_checkpoint`. Raises: CheckpointError if it cannot be read."""
    return _read_json(folder / STATE)["run"]


def _verify_shared(folder: Path, world: World) -> None:
    """Verifies the files of a checkpoint, each rank a share of the files.

    Rank 0 reads the manifest, since other ranks may not see it yet. Raises: CheckpointError, PeerFailure."""
    manifest: dict[str, dict[str, Any]] = {}
    with all_ranks_or_none(world):
        if world.is_main:
            manifest = atomic_dir.read_manifest(folder)
    manifest = gather_json(manifest, world)[0]
    with all_ranks_or_none(world):
        by_size = sorted(manifest, key=lambda name: (manifest[name]["bytes"], name))  # shares of similar sizes
        atomic_dir.verify(folder, {name: manifest[name] for name in by_size[world.rank :: world.size]})


def _check_model(engine: Engine, reader: _Reader, stage_transition: bool) -> None:
    """Compares the parameters and buffers of the engine's model with those of the checkpoint.

    Raises: CheckpointError that lists missing, unexpected, misshapen and differently frozen parameters."""
    pieces = {piece.name: piece for piece in engine.pieces()}
    buffers = {name: tuple(b.shape) for name, b in _buffers(engine.module).items()}
    saved_buffers = {name: tuple(b.shape) for name, b in reader.buffers().items()}
    ours = {name: piece.shape for name, piece in pieces.items()} | buffers
    theirs = reader.shapes | saved_buffers
    faults = []
    if missing := sorted(ours.keys() - theirs.keys()):
        faults.append(f"it lacks {_names(missing)}")
    if unexpected := sorted(theirs.keys() - ours.keys()):
        faults.append(f"it has {_names(unexpected)} that the model lacks")
    shared = sorted(ours.keys() & theirs.keys())
    if misshapen := [f"{n} is {list(theirs[n])}, not {list(ours[n])}" for n in shared if ours[n] != theirs[n]]:
        faults.append(_names(misshapen))
    frozen = [
        n for n, p in pieces.items() if n in reader.kinds and (FROZEN in p.tensors) != (FROZEN in reader.kinds[n])
    ]
    if frozen and not stage_transition:
        faults.append(f"{_names(sorted(frozen))} trained in one and frozen in the other")
    if faults:
        raise CheckpointError(
            f"{reader.folder} is a checkpoint from another model: {'; '.join(faults)}; resume with the model "
            "configuration that wrote it"
        )


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {atomic_dir.remedy(path.parent)}") from error
