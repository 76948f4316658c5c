"""Elastic checkpoints: every rank writes the flat shards that it owns, and any number of ranks reads the ranges that
each rank needs.

    rank00000.safetensors   "<parameter>/<kind>": 1-D; kind is fp32, ema, frozen, or the name of a moment:
                            exp_avg and exp_avg_sq of AdamW, momentum_buffer of Muon, a plugin's own
    index.json              pieces: {<parameter>: {shape, kinds: {<kind>: dtype}, parts: [[rank, start, length], ...]}},
                            cursors: {<lane>: cursor}
    buffers.safetensors     buffers of the model, by name
    state.json              progress and settings of the run, optimizer, number of ranks, versions

DeepSpeed's own formats are not used: the native format loads only on the same number of ranks, and the universal format
restores wrong settings with several optimizer groups and drops frozen parameters and buffers. No file is pickled.
`formats.elastic` reads a checkpoint without an engine, also one of an earlier version, which has an index per rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.elastic import BUFFERS, EMA, FORMAT, FROZEN, INDEX, MASTER, STATE, ElasticReader
from univitar_ds.formats.weight_files import save_tensors
from univitar_ds.training.checkpoint import atomic_dir
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, scatter_json
from univitar_ds.training.engine.engine import Engine, ParamShard

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
    pieces = list(engine.pieces())
    merge = atomic_dir.Merge(
        lambda: _share(pieces, world, cursors),
        lambda folder, shares: [atomic_dir.write_json(folder / INDEX, _merged(pieces, shares), indent=None)],
    )

    def write(folder: Path) -> Iterator[Path]:
        yield _write_rank(pieces, world, folder)
        if world.is_main:
            yield save_tensors(_buffers(engine.module), folder / BUFFERS)
            content = {"format": FORMAT, "world_size": world.size, "optimizer": engine.optimizer_state(), "run": state}
            yield atomic_dir.write_json(folder / STATE, content)

    return atomic_dir.commit(root, step, write, world, keep, merge)


def _write_rank(pieces: Sequence[ParamShard], world: World, folder: Path) -> Path:
    tensors = {
        f"{piece.name}/{kind}": tensor.detach().to("cpu", copy=True)  # views share their storage
        for piece in pieces
        if _writes(piece, world)
        for kind, tensor in piece.tensors.items()
    }
    return save_tensors(tensors, folder / f"rank{world.rank:05d}.safetensors")


def _writes(piece: ParamShard, world: World) -> bool:
    """Whether this rank writes a piece. Only rank 0 writes a frozen parameter that every rank has in full."""
    shared = FROZEN in piece.tensors and piece.length == math.prod(piece.shape)
    return piece.written and piece.length > 0 and not (shared and world.rank)


def _share(pieces: Sequence[ParamShard], world: World, cursors: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns the part of the index that rank 0 does not know: which pieces this rank has written.

    `written`: [number of the piece, start, length, number of its kinds], since names and kinds are long."""
    kinds: list[dict[str, str]] = []
    written = []
    for number, piece in enumerate(pieces):
        if _writes(piece, world):
            own = {kind: str(tensor.dtype).removeprefix("torch.") for kind, tensor in piece.tensors.items()}
            if own not in kinds:
                kinds.append(own)
            written.append([number, piece.start, piece.length, kinds.index(own)])
    return {"written": written, "kinds": kinds, "cursors": {str(lane): cursor for lane, cursor in cursors.items()}}


def _merged(pieces: Sequence[ParamShard], shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the index of a checkpoint. Args: pieces: of any rank, for names and shapes; shares: of all ranks."""
    entries = [{"shape": list(piece.shape), "kinds": {}, "parts": []} for piece in pieces]
    cursors: dict[str, Any] = {}
    for rank, share in enumerate(shares):
        for number, start, length, kinds in share["written"]:
            entries[number]["kinds"] = share["kinds"][kinds]
            entries[number]["parts"].append([rank, start, length])
        cursors |= share["cursors"]
    names = [piece.name for piece in pieces]
    return {"pieces": dict(zip(names, entries, strict=True)), "cursors": cursors}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the persistent buffers on the CPU, by name."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if not isinstance(value, nn.Parameter)
    }


def load_checkpoint(engine: Engine, folder: Path, *, stage_transition: bool = False) -> Saved:
    """Loads a checkpoint of any number of ranks and any ZeRO stage into `engine`. All ranks call it.

    Args: stage_transition: whether trained and frozen parameters may differ between engine and checkpoint. Parameters
    that are newly trained get moments as at the start of a run, and their average starts at their value.
    Raises: CheckpointError on all ranks if a file is damaged or the checkpoint is from another model.
    """
    world = engine.world
    _verify_shared(folder, world)
    with ExitStack() as open_files:
        with all_ranks_or_none(world):
            reader = ElasticReader(folder, open_files)
            _check_model(engine, reader, stage_transition)
            for piece in engine.pieces():
                for kind, target in piece.tensors.items():
                    source = _source(kind, reader.kinds.get(piece.name, {}))
                    if piece.length and source is None:
                        target.fill_(engine.initial.get(kind, 0.0))
                    elif piece.length:
                        reader.fill(piece.name, source, piece.start, target)
            buffers = dict(engine.module.named_buffers())
            for name, value in reader.buffers().items():
                buffers[name].data.copy_(value)
            engine.restore_optimizer_state(reader.content["optimizer"], stage_transition=stage_transition)
        engine.refresh_params()
        return Saved(reader.content["run"], reader.cursors)


def _source(kind: str, saved: Collection[str]) -> str | None:
    """Returns the saved kind from which `kind` is loaded; None if it is a moment that starts at its initial value."""
    if kind in saved or not saved:
        return kind
    if kind == FROZEN:
        return MASTER
    return FROZEN if kind in (MASTER, EMA) and FROZEN in saved else None


def _verify_shared(folder: Path, world: World) -> None:
    """Verifies the files of a checkpoint, each rank a share of the files.

    Rank 0 reads the manifest, since other ranks may not see it yet, and sends each rank its share.
    Raises: CheckpointError, PeerFailure."""
    manifest: dict[str, dict[str, Any]] = {}
    with all_ranks_or_none(world):
        if world.is_main:
            manifest = checkpoint_dir.read_manifest(folder)
    by_size = sorted(manifest, key=lambda name: (manifest[name]["bytes"], name))  # shares of similar sizes
    shares = [{name: manifest[name] for name in by_size[rank :: world.size]} for rank in range(world.size)]
    share = scatter_json(shares if world.is_main else None, world)
    with all_ranks_or_none(world):
        checkpoint_dir.verify(folder, share)


def _check_model(engine: Engine, reader: ElasticReader, stage_transition: bool) -> None:
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
    if differ := _other_moments(pieces, reader):
        raise CheckpointError(
            f"{reader.folder} has other moments of the optimizer than this run: {differ}; resume with the version of "
            "the plugin that wrote it"
        )
    if faults:
        raise CheckpointError(
            f"{reader.folder} is a checkpoint from another model: {'; '.join(faults)}; resume with the model "
            "configuration that wrote it"
        )


def _other_moments(pieces: Mapping[str, ParamShard], reader: ElasticReader) -> str:
    """Returns a difference between the moments of a parameter that was and is trained, or else an empty text."""
    weights = {MASTER, EMA, FROZEN}
    for name, piece in pieces.items():
        saved = reader.kinds.get(name, {})
        if piece.length and MASTER in piece.tensors and MASTER in saved:
            ours, theirs = piece.tensors.keys() - weights, saved.keys() - weights
            if ours != theirs:
                return f"{', '.join(sorted(theirs)) or 'none'} of {name}, not {', '.join(sorted(ours)) or 'none'}"
    return ""


def _names(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + rest
