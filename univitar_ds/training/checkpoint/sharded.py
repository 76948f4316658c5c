"""Elastic checkpoints: every rank writes the flat shards that it owns, and any number of ranks can load them, each the
ranges that it needs.

    node00000.safetensors   "<parameter>/<kind>" of each rank of a node, 1-D, see `formats.checkpoint.shared_file`; kind
                            is fp32, ema, frozen, or the name of a moment: exp_avg and exp_avg_sq of AdamW,
                            momentum_buffer of Muon, a plugin's own
    index.json              pieces: {<parameter>: {shape, kinds: {<kind>: dtype}, parts: [[rank, start, length], ...]}},
                            cursors: {<lane>: cursor}, files: {<file that ranks share>: [rank, ...]}; with tensor
                            parallelism a piece also has slices: [run, count] (`formats.slices`), and `start` counts
                            elements as if the slices were concatenated
    buffers.safetensors     buffers of the model, by name
    state.json              progress and settings of the run, optimizer, number of ranks, versions

DeepSpeed's own formats are not used: the native format loads only on the same number of ranks, and the universal format
restores wrong settings with several optimizer groups and drops frozen parameters and buffers. No file is pickled.
`formats.elastic` reads a checkpoint without an engine, also one of an earlier version, with files or indices per rank.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from univitar_ds.errors import CheckpointError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.formats.checkpoint.shared_file import places, rank_file
from univitar_ds.formats.elastic import BUFFERS, EMA, FORMAT, FROZEN, INDEX, MASTER, SLICED, STATE, ElasticReader, Fetch
from univitar_ds.identity import this_machine
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.protocol import Content, Part, Retention, save_now, saving
from univitar_ds.training.checkpoint.staging import Staging
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, gather_numbers, scatter_json
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
        state, cursors: see `copied_state`.
        keep: number of newest checkpoints to keep.
    Raises: as `protocol.save_now`. For the files that a crash leaves, see `atomic_dir`.
    """
    target = LocalFolder(root, step, Retention(keep))
    save_now(saving(target, copied_state(engine, state, cursors, Staging(engine.world)), engine.world), engine.world)
    return target.folder


def copied_state(
    engine: Engine,
    state: dict[str, Any],
    cursors: dict[int, dict[str, Any]],
    staging: Staging,
    *,
    shares_files: bool = True,
) -> Content:
    """Copies the training state of this rank, so that training continues while the copy is written. All ranks call it.

    Args:
        state: state of the run, as JSON; the same on all ranks.
        cursors: data cursors of the lanes of this rank.
        staging: holds the copy until it is next used.
        shares_files: whether the ranks of a node write one file.
    """
    world, pieces = engine.world, list(engine.pieces())
    own = {
        f"{piece.name}/{kind}": tensor
        for piece in pieces
        if writes(piece, world)
        for kind, tensor in piece.tensors.items()
    }
    tensors = staging.copy(own, engine.disk) if own else memoryview(b"")
    parts = []
    if world.is_main:
        parts.append(Part(BUFFERS, save(persistent_buffers(engine.module))))
        sliced = any(piece.slice is not None for piece in pieces)
        content = {
            "format": SLICED if sliced else FORMAT,
            "world_size": world.size,
            "optimizer": engine.optimizer_state(),
            "run": state,
        }
        parts.append(Part(STATE, json.dumps(content, indent=1).encode()))
    others = sum(len(part.content) for part in parts)
    table = gather_numbers([len(tensors), _node(), others], world)
    sizes, nodes, _ = (column.tolist() for column in table.long().T)
    all_places = places(sizes, nodes if shares_files else range(world.size))
    if own:
        place = all_places[world.rank]
        parts.append(Part(place.name, tensors, place.offset))
        if place.header:
            parts.append(Part(place.name, place.header))
    files: dict[str, list[int]] = {}
    for rank, place in all_places.items():
        if place.name != rank_file(rank):
            files.setdefault(place.name, []).append(rank)
    share = _share(pieces, world, copy.deepcopy(cursors))  # sent later, while training changes the cursors
    # `merge` must not hold the pieces, which keep the engine's memory alive.
    shapes = {piece.name: list(piece.shape) for piece in pieces}
    slices = {piece.name: [piece.slice.run, piece.slice.count] for piece in pieces if piece.slice is not None}

    def merge(shares: list[dict[str, Any]]) -> list[Part]:
        return [Part(INDEX, json.dumps({**_merged(shapes, slices, shares), "files": files}).encode())]

    return Content(parts, share, merge, int(table[:, [0, 2]].sum()))


def _node() -> int:
    """Returns a number that the ranks of this machine share."""
    return zlib.crc32(json.dumps(this_machine(), sort_keys=True).encode())


def writes(piece: ParamShard, world: World) -> bool:
    """Whether this rank writes a piece to checkpoints. Only rank 0 writes a frozen parameter that all ranks have."""
    shared = FROZEN in piece.tensors and piece.length == math.prod(piece.shape)
    return piece.written and piece.length > 0 and not (shared and world.rank)


def _share(pieces: Sequence[ParamShard], world: World, cursors: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Returns this rank's part of the index: the pieces that it writes, and its cursors.

    `written`: [index of the piece, start, length, index into `kinds`]; names in place of indices would be long."""
    kinds: list[dict[str, str]] = []
    written = []
    for number, piece in enumerate(pieces):
        if writes(piece, world):
            own = {kind: str(tensor.dtype).removeprefix("torch.") for kind, tensor in piece.tensors.items()}
            if own not in kinds:
                kinds.append(own)
            start = piece.start
            if piece.slice is not None:  # slices are numbered one after the other
                start += piece.slice.place * (math.prod(piece.shape) // piece.slice.count)
            written.append([number, start, piece.length, kinds.index(own)])
    return {"written": written, "kinds": kinds, "cursors": {str(lane): cursor for lane, cursor in cursors.items()}}


def _merged(
    shapes: dict[str, list[int]], slices: dict[str, list[int]], shares: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the index of a checkpoint.

    Args: shapes: of all parameters, in order; slices: [run, count] of tensor-parallel parameters; shares: of all ranks.
    """
    entries = [
        {"shape": shape, "kinds": {}, "parts": [], **({"slices": slices[name]} if name in slices else {})}
        for name, shape in shapes.items()
    ]
    cursors: dict[str, Any] = {}
    for rank, share in enumerate(shares):
        for number, start, length, kinds in share["written"]:
            entries[number]["kinds"] = share["kinds"][kinds]
            entries[number]["parts"].append([rank, start, length])
        cursors |= share["cursors"]
    return {"pieces": dict(zip(shapes, entries, strict=True)), "cursors": cursors}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the persistent buffers on the CPU, by name."""
    state = module.state_dict(keep_vars=True)
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in state.items()
        if not isinstance(value, nn.Parameter)
    }


def load_checkpoint(
    engine: Engine, folder: Path, *, stage_transition: bool = False, fetch: Fetch | None = None
) -> Saved:
    """Loads a checkpoint of any number of ranks and any ZeRO stage into `engine`. All ranks call it.

    Args:
        stage_transition: whether parameters may be trained in the engine and frozen in the checkpoint, or vice versa.
            Parameters that are newly trained get moments as at the start of a run, and their average starts at their
            value.
        fetch: see `ElasticReader`; verifies the files that it downloads.
    Raises: CheckpointError if a file is damaged or the checkpoint is from another model, PeerFailure on a rank that
        found no error.
    """
    world = engine.world
    if fetch is None:
        _verify_shared(folder, world)
    with ExitStack() as open_files:
        with all_ranks_or_none(world):
            reader = ElasticReader(folder, open_files, fetch)
            _check_model(engine, reader, stage_transition)
            for piece in engine.pieces():
                for kind, target in piece.tensors.items():
                    source = _source(kind, reader.kinds.get(piece.name, {}))
                    if piece.length and source is None:
                        target.fill_(engine.initial.get(kind, 0.0))
                    elif piece.length:
                        reader.fill(piece.name, source, piece.start, target, piece.slice)
            buffers = dict(engine.module.named_buffers())
            for name, value in reader.buffers().items():
                buffers[name].data.copy_(value)
            engine.restore_optimizer_state(reader.content["optimizer"], stage_transition=stage_transition)
        engine.refresh_params()
        return Saved(reader.content["run"], reader.cursors)


def _source(kind: str, saved: Collection[str]) -> str | None:
    """Returns the saved kind from which `kind` is loaded; None for a moment that starts at its initial value."""
    if kind in saved or not saved:
        return kind
    if kind == FROZEN:
        return MASTER
    return FROZEN if kind in (MASTER, EMA) and FROZEN in saved else None


def _verify_shared(folder: Path, world: World) -> None:
    """Verifies the files of a checkpoint. Each rank reads a share of them.

    Rank 0 reads the manifest, since a shared disk may not show it to other ranks yet, and sends each rank its share.
    Raises: CheckpointError on a rank that finds damage, PeerFailure on the others."""
    manifest: dict[str, dict[str, Any]] = {}
    with all_ranks_or_none(world):
        if world.is_main:
            manifest = checkpoint_dir.read_manifest(folder)
    parts = [part for name, entry in manifest.items() for part in checkpoint_dir.parts_of(name, entry)]
    parts.sort(key=lambda part: (part[2], part))  # shares of similar sizes
    shares: list[dict[str, Any]] = [{} for _ in range(world.size)]
    for number, (name, *part) in enumerate(parts):
        share = shares[number % world.size]
        share.setdefault(name, {"bytes": manifest[name]["bytes"], "parts": []})["parts"].append(part)
    share = scatter_json(shares if world.is_main else None, world)
    with all_ranks_or_none(world):
        checkpoint_dir.verify(folder, share)


def _check_model(engine: Engine, reader: ElasticReader, stage_transition: bool) -> None:
    """Compares the parameters and buffers of the engine's model with those of the checkpoint.

    Raises: CheckpointError that lists parameters that are missing, unexpected, of another shape, or frozen in only one
        of the two."""
    pieces = {piece.name: piece for piece in engine.pieces()}
    buffers = {name: tuple(b.shape) for name, b in persistent_buffers(engine.module).items()}
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
        faults.append(f"{_names(sorted(frozen))} trained in one of them and frozen in the other")
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
    """Returns the first difference in moments between engine and checkpoint, as text; empty without one."""
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
