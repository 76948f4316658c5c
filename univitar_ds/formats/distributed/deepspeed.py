"""DeepSpeed's own ZeRO checkpoints of stages 1, 2 and 3, from any number of ranks, read without DeepSpeed.

    latest                                             the name of the newest checkpoint's folder
    <tag>/mp_rank_00_model_states.pt                   weights in the precision of the forward pass (stages 1 and 2)
    <tag>/zero_pp_rank_<r>_mp_rank_00_model_states.pt  this rank's part of frozen parameters (stage 3)
    <tag>/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt  this rank's flat float32 weights and moments

The weights are the float32 masters; frozen parameters and buffers have the precision that was stored. A checkpoint does
not hold the model's configuration, see `configuration.find_configuration`. Checkpoints of tensor, pipeline or expert
parallelism, of parameters on NVMe and of DeepSpeed's `elastic_checkpoint` are rejected.

Files are unpickled with torch's restricted unpickler. Classes that DeepSpeed writes are replaced by `_STAND_INS`, which
do nothing; a file that names anything else is rejected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from univitar_ds.errors import CheckpointError, first_line
from univitar_ds.formats.configuration import (
    Configuration,
    canonical_names,
    find_configuration,
    whole_or_encoder,
)
from univitar_ds.formats.stored_model import MOMENTS, OptimizerState, StoredModel, TensorInfo, Tensors
from univitar_ds.formats.weight_files import some

LATEST = "latest"
_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MAPPED = 256 * 2**20
"""Bytes that are read from mapped files before the files are closed, since pages that were read count as memory."""


class _Number(int):
    """Stands in for DeepSpeed's enumerations of numbers."""


class _Fields:
    """Stands in for a class of DeepSpeed: keeps the object's attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


_STAND_INS: dict[str, type] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Number,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Fields,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Fields,
    "deepspeed.utils.tensor_fragment.fragment_address": _Fields,
}
"""Stand-ins for the classes that a file may have besides tensors and plain values, by DeepSpeed's name."""


def recognises(folder: Path) -> bool:
    """Returns whether `folder` is a DeepSpeed checkpoint, or contains checkpoints and a file `latest`."""
    try:
        return any(_OPTIM.fullmatch(path.name) for path in tag_folder(folder, LATEST).iterdir())
    except (CheckpointError, OSError):
        return False


def read(
    folder: Path,
    config_folder: Path | None = None,
    *,
    configuration: Configuration | None = None,
    heads: int | None = None,
) -> StoredModel:
    """Returns the model in a folder with `latest`, or in one of its checkpoints. Tensors are read when accessed.

    Without a configuration of the whole model (`univitar.json` or a run's folder) the result is the encoder alone.
    Without an optimizer's moments of every trained parameter, `optimizer` is None. Groups have `step`, the number of
    updates of their parameters.

    Args: config_folder: folder with the configuration, see `configuration.find_configuration`; configuration: the
        configuration itself, instead of a folder; heads: number of the encoder's attention heads, if there is neither.
    Raises: CheckpointError if files are missing, damaged, of another program, or do not fit the configuration.
    """
    tag = tag_folder(folder, LATEST)
    source = _Source(tag)
    renamed = canonical_names(source.places, tag)
    tensors = source.tensors("fp32").renamed(renamed)
    encoder, joint = find_configuration(tensors.infos, (tag, tag.parent), config_folder, heads, configuration)
    origin = {"path": str(tag), "step": source.global_steps, "zero_stage": source.stage, "ranks": len(source.files)}
    return whole_or_encoder(StoredModel(tag, "deepspeed", encoder, tensors, joint, source.optimizer(renamed), origin))


def tag_folder(folder: Path, name: str) -> Path:
    """Returns the folder of one checkpoint: `folder`, or the folder in it that its file `name` names.

    Raises: CheckpointError if the file names a folder elsewhere."""
    latest = folder / name
    if not latest.is_file():
        return folder
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or Path(tag).name != tag or tag == ".." or "\0" in tag:
        raise CheckpointError(f"{latest} names {tag[:80]!r}; checkpoints must be folders beside it")
    return folder / tag


def load_pt(path: Path) -> Any:
    """Returns the content of a file of `torch.save`, with mapped tensors; nothing in the file is run.

    Raises: CheckpointError if the file is damaged or names anything but tensors and `_STAND_INS`."""
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in _STAND_INS.items()]):
            others = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            if not others:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = first_line(error)[:300]
        raise CheckpointError(f"{path} is damaged or not of DeepSpeed ({reason}); fetch it again") from error
    raise CheckpointError(
        f"{path} needs {some(others)} to be read, which could run code; only tensors, plain values and DeepSpeed's own "
        "classes are read. Save the checkpoint without them."
    )


@contextmanager
def understanding(path: Path) -> Iterator[None]:
    """Wraps code that parses the content of a file. Raises: CheckpointError if the content is not as expected."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that this program reads ({type(error).__name__}: {str(error)[:200]}); "
            "supported are ZeRO stages 1, 2 and 3 of DeepSpeed without model or expert parallelism"
        ) from error


def group_names(ids: list[list[int]], shapes: list[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the names of the parameters in each group. Args: ids: indices into `shapes` of each group."""
    return [[name for index in group for name in (shapes[index] if index < len(shapes) else ())] for group in ids]


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a group's settings without its parameters."""
    return {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}


def size(shape: Any) -> tuple[int, ...]:
    """Returns a stored shape as a tuple. Raises: ValueError if it is none."""
    sizes = tuple(int(side) for side in shape)
    if min(sizes, default=0) < 0:
        raise ValueError(f"{sizes} is not a shape")
    return sizes


def plain(tensor: Any, name: str) -> Tensor:
    """Returns `tensor` detached: DeepSpeed stores parameters, and a copy of a parameter would keep a reference to it
    and to the mapping of its file.

    Raises: ValueError if it is no dense tensor, or refers to values that are not stored."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name} is no dense tensor")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise ValueError(f"{name} has fewer values than its shape {tuple(tensor.shape)}")
    return tensor.detach()


@dataclass(frozen=True)
class _Part:
    """Elements `start` to `start + length` of a flat tensor, which is the one of group `group` of rank `rank`."""

    rank: int
    group: int
    start: int
    length: int


@dataclass(frozen=True)
class _Place:
    """Where a tensor is stored: in parts of the flat tensors, or in the model files of `ranks` under `key`."""

    shape: tuple[int, ...]
    parts: tuple[_Part, ...] = ()
    key: str = ""
    ranks: tuple[int, ...] = ()
    frozen: bool = False


class _Source:
    """A checkpoint's files. `places` says where each tensor is, by its name in the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _rank_files(folder)
        if not self.files:
            raise CheckpointError(f"{folder} has no zero_pp_rank_*_optim_states.pt; name a checkpoint of DeepSpeed")
        self._open: dict[Path, dict[str, Any]] = {}
        self._bytes_read = 0
        states = [self._state(rank) for rank in range(len(self.files))]
        with understanding(self.files[0]):
            self.stage = 3 if "fp32_flat_groups" in states[0] else int(states[0].get("zero_stage", 1))
            counts = states[0]["partition_count"]
            ranks = max(counts) if isinstance(counts, list) else counts
            if states[0].get("ds_zero_partition_groups"):
                raise ValueError("its parameters are partitioned by experts")
        if ranks != len(self.files):
            raise CheckpointError(f"{folder} is of {ranks} ranks but has files of {len(self.files)}; fetch it again")
        with understanding(self._model_file(0)):
            content = self._load(self._model_file(0))
            self.shapes = [{name: size(shape) for name, shape in group.items()} for group in content["param_shapes"]]
            self.global_steps = int(content.get("global_steps", 0))
            order, shared = list(content["module"]), dict(content.get("shared_params") or {})
            fixed = self._frozen_places(content)
        with understanding(self.files[0]):
            trained = self._partitioned(states) if self.stage == 3 else self._mapped(states)
        found = {**fixed, **trained}
        found.update({alias: found[owner] for alias, owner in shared.items() if owner in found})
        self.places = {name: found[name] for name in (*order, *found) if name in found}
        self._trained = set(trained)
        self._infos = {name: self._info(name, place) for name, place in self.places.items()}

    def tensors(self, kind: str) -> Tensors:
        """Returns all weights if `kind` is "fp32", otherwise that moment of the trained parameters."""
        infos = {name: info for name, info in self._infos.items() if kind == "fp32" or name in self._trained}
        return Tensors(infos, lambda name: self._read(name, kind, infos[name]))

    def optimizer(self, renamed: Callable[[str], str | None]) -> OptimizerState | None:
        """Returns the optimizer's state under new names; None if it lacks a moment of a trained parameter."""
        states = [self._state(rank) for rank in range(len(self.files))]
        with understanding(self.files[0]):
            for part in (part for name in self._trained for part in self.places[name].parts if part.length):
                state = self._base(states[part.rank])["state"].get(part.group, {})
                if any(plain(state[key], key).numel() < part.start + part.length for key in MOMENTS if key in state):
                    raise ValueError("a moment is shorter than the weights")
                if not all(key in state for key in MOMENTS):
                    return None
            base = self._base(states[0])
            groups = [dict(group) for group in base["param_groups"]]
            names = group_names([group["params"] for group in groups], self.shapes)
            kept = []
            for group, members in zip(groups, names, strict=True):
                members = [new for name in members if (new := renamed(name)) is not None]
                state = base["state"].get(group["params"][0], {}) if group["params"] else {}
                step = int(state.get("step", group.get("step", 0)))
                if members:
                    kept.append({**settings(group), "step": step, "params": members})
        step = max((group["step"] for group in kept), default=0)
        moments = [self.tensors(kind).renamed(renamed) for kind in MOMENTS]
        return OptimizerState(step, *moments, kept)

    def _frozen_places(self, content: dict[str, Any]) -> dict[str, _Place]:
        """Returns the places of tensors in the model files. Those of trained parameters are replaced by the masters."""
        places = {}
        for name, tensor in content["module"].items():
            # Stage 3 stores an empty tensor in place of every parameter.
            if isinstance(tensor, Tensor) and (self.stage < 3 or tensor.numel()):
                places[name] = _Place(tuple(plain(tensor, name).shape), key="module", ranks=(0,))
        if self.stage == 3:
            for name, shape in (content.get("frozen_param_shapes") or {}).items():
                ranks = tuple(range(len(self.files)))
                places[name] = _Place(size(shape), key="frozen_param_fragments", ranks=ranks)
        return places

    def _mapped(self, states: list[dict[str, Any]]) -> dict[str, _Place]:
        """Returns the places of trained parameters in stages 1 and 2, where a rank has a slice of a flat group."""
        parts: dict[str, list[_Part]] = {name: [] for group in self.shapes for name in group}
        for rank, state in enumerate(states):
            for group, mapping in enumerate(state["param_slice_mappings"]):
                for name, address in mapping.items():
                    part = _Part(rank, group, int(address.fields["start"]), int(address.fields["numel"]))
                    parts[name].append(part)
        shapes = {name: shape for group in self.shapes for name, shape in group.items()}
        return {name: self._checked(name, shapes[name], tuple(found)) for name, found in parts.items()}

    def _partitioned(self, states: list[dict[str, Any]]) -> dict[str, _Place]:
        """Returns the places of trained parameters in stage 3, where a rank has a slice of every parameter."""
        ranks, places = len(states), {}
        for group, shapes in enumerate(self.shapes):
            start = 0
            for name, shape in shapes.items():
                share = math.ceil(math.prod(shape) / ranks)
                left = math.prod(shape)
                parts = []
                for rank in range(ranks):
                    parts.append(_Part(rank, group, start, min(share, left)))
                    left -= parts[-1].length
                places[name] = self._checked(name, shape, tuple(parts))
                start += share
        return places

    def _checked(self, name: str, shape: tuple[int, ...], parts: tuple[_Part, ...]) -> _Place:
        stored = sum(part.length for part in parts)
        if stored != math.prod(shape):
            raise ValueError(f"{name} has {stored} values for the shape {shape}")
        for part in parts:
            whole = plain(self._flat(part.rank, part.group, "fp32"), name).numel()
            if part.start < 0 or part.length < 0 or part.start + part.length > whole:
                raise ValueError(f"{name} ends at {part.start + part.length} of {whole} values")
        return _Place(shape, parts)

    def _info(self, name: str, place: _Place) -> TensorInfo:
        with understanding(self.folder):
            if place.parts:
                return TensorInfo(place.shape, self._flat(place.parts[0].rank, place.parts[0].group, "fp32").dtype)
            stored = [plain(self._load(self._model_file(rank))[place.key][name], name) for rank in place.ranks]
            if sum(tensor.numel() for tensor in stored) < math.prod(place.shape):
                raise ValueError(f"{name} has too few values for the shape {place.shape}")
            return TensorInfo(place.shape, stored[0].dtype)

    def _read(self, name: str, kind: str, info: TensorInfo) -> Tensor:
        place = self.places[name]
        if place.parts:
            pieces = ((part.rank, part.group, part.start, part.length) for part in place.parts)
            slices = (self._flat(*where, kind).detach().view(-1)[at : at + count] for *where, at, count in pieces)
        else:
            stored = (self._load(self._model_file(rank))[place.key][name] for rank in place.ranks)
            slices = (tensor.detach().reshape(-1) for tensor in stored)
        whole = torch.empty(math.prod(info.shape), dtype=info.dtype)
        filled = 0
        with understanding(self.folder):
            for piece in slices:
                piece = piece[: whole.numel() - filled]  # the last ranks' parts of stage 3 are padded
                whole[filled : filled + piece.numel()] = piece
                filled += piece.numel()
        self._count(info.nbytes)
        return whole.view(info.shape)

    def _flat(self, rank: int, group: int, kind: str) -> Tensor:
        state = self._state(rank)
        if kind != "fp32":
            return self._base(state)["state"][group][kind]
        return state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]

    def _base(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns the state of torch's optimizer."""
        return state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]

    def _state(self, rank: int) -> dict[str, Any]:
        path = self.files[rank]
        with understanding(path):
            return self._load(path)["optimizer_state_dict"]

    def _model_file(self, rank: int) -> Path:
        if self.stage == 3:
            return self.folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        return self.folder / "mp_rank_00_model_states.pt"

    def _load(self, path: Path) -> dict[str, Any]:
        if path not in self._open:
            self._open[path] = load_pt(path)
        return self._open[path]

    def _count(self, nbytes: int) -> None:
        self._bytes_read += nbytes
        if self._bytes_read > _MAPPED:
            self._open.clear()
            self._bytes_read = 0


def _rank_files(folder: Path) -> list[Path]:
    """Returns the optimizer's files by rank. Raises: CheckpointError if ranks are missing or a model is split."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _OPTIM.fullmatch(path.name):
            if int(match[2]):
                raise CheckpointError(f"{path} is of tensor or pipeline parallelism; save it without, or convert there")
            found[int(match[1])] = path
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(f"{folder} lacks files of ranks between 0 and {max(found)}; fetch it again")
    return [found[rank] for rank in sorted(found)]
