"""Checkpoints of `torch.distributed.checkpoint` (DCP), of any number of ranks, read one tensor at a time.

    .metadata        names, shapes and places of everything, a pickle
    __0_0.distcp     tensors and values, each as by `torch.save`
    univitar.json    configuration, see `sidecar`; DCP ignores it

`write` stores {"model": state dict, "optimizer": what `get_optimizer_state_dict` returns}, so a torch program reads it
with `dcp.load({"model": model.state_dict()}, checkpoint_id=folder)`. `read` also reads checkpoints of other programs,
with the tensors of this project's model below any prefix.

`.metadata` is read with an unpickler that knows only the names in `_STAND_INS` and replaces each by a class or function
that does nothing; a file that names anything else is refused.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from univitar_ds.errors import CheckpointError, first_line, writing
from univitar_ds.formats.configuration import (
    Configuration,
    canonical_names,
    find_configuration,
    whole_or_encoder,
)
from univitar_ds.formats.sidecar import SIDECAR, write_sidecar
from univitar_ds.formats.stored_model import MOMENTS, VISION, OptimizerState, StoredModel, TensorInfo, Tensors
from univitar_ds.formats.weight_files import remembering
from univitar_ds.owned import Names

METADATA = ".metadata"
MODEL, OPTIMIZER, STATE, GROUPS = "model", "optimizer", "state", "param_groups"
FILES: Names = {r"\.metadata(\.tmp)?": None, r"__\d+_\d+\.distcp": None, re.escape(SIDECAR): None}
"""All entries that `write` makes."""
DEFAULTS: dict[str, Any] = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True,
}  # fmt: skip
"""Settings of torch's AdamW that a program asks for, and that other formats may not have."""


class _Fields:
    """Stands in for a class: keeps an object's attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, "state", {}).get(name, default)


def _nothing(*_: Any) -> None:
    """Stands in for a function and for classes whose objects are not needed."""


_DCP = "torch.distributed.checkpoint"
_STAND_INS: dict[tuple[str, str], str] = {
    **{
        (f"{_DCP}.metadata", name): name
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta",
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): "_StorageInfo",
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): "",
    ("torch.serialization", "_get_layout"): "",
    ("pathlib", "PosixPath"): "", ("pathlib", "WindowsPath"): "",
    ("pathlib._local", "PosixPath"): "", ("pathlib._local", "WindowsPath"): "",
}  # fmt: skip
"""What `.metadata` may name beside torch's types and sizes, with the name of its stand-in ("" for `_nothing`)."""


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`. The stand-ins are new classes of each object, since a pickle may change attributes of them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes = {name: type(name, (_Fields,), {}) for name in _STAND_INS.values() if name}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return self._classes.get(_STAND_INS[module, name], _nothing)
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"the metadata needs {module}.{name} to be read, which could run code; only the metadata of "
            f"{_DCP} is read. Save the checkpoint without it."
        )


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor, or a value: `length` bytes of `file` from `offset`, for the block `sizes` from `at`."""

    file: Path
    offset: int
    length: int
    at: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def recognises(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of DCP."""
    try:
        return (folder / METADATA).is_file()
    except OSError:
        return False


def read(
    folder: Path,
    config_folder: Path | None = None,
    *,
    configuration: Configuration | None = None,
    heads: int | None = None,
) -> StoredModel:
    """Returns the model in a checkpoint. Tensors are read when accessed.

    Without a configuration of the whole model the result is the encoder alone. `optimizer` is None unless both moments
    and the parameter groups of the trained parameters are stored in the layout of `get_optimizer_state_dict`.

    Args: config_folder: folder with the configuration, see `configuration.find_configuration`; configuration: the
        configuration itself, instead of a folder; heads: number of the encoder's attention heads, if there is neither.
    Raises: CheckpointError if files are missing, damaged, of another model, or do not fit the configuration.
    """
    source = _Source(folder)
    moments = {name for name, path in source.paths.items() if STATE in path[:-1]}
    weights = source.tensors().renamed(lambda name: None if name in moments else name)
    renamed = canonical_names(weights, folder)
    tensors = weights.renamed(renamed)
    encoder, joint = find_configuration(tensors.infos, (folder,), config_folder, heads, configuration)

    def member(name: str) -> str | None:
        """Returns the canonical name of a parameter that the optimizer names."""
        return next((found for found in (name, VISION + name, renamed(name)) if found in tensors), None)

    optimizer = source.optimizer(member)
    return whole_or_encoder(
        StoredModel(folder, "dcp", encoder, tensors, joint, optimizer, {"path": str(folder)}),
    )


def write(model: StoredModel, folder: Path) -> None:
    """Writes a checkpoint, one file per tensor, with one tensor in memory at a time.

    Raises: StorageError if the folder cannot be written.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystem

    tensors, state = _state_dict(model)

    class Planner(DefaultSavePlanner):
        """Reads each tensor when it is written. The state dict has tensors without values."""

        def lookup_object(self, index: Any) -> Any:
            return tensors[index.fqn]() if index.fqn in tensors else super().lookup_object(index)

    class Files(FileSystem):
        @contextmanager
        def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
            with super().create_stream(path, mode) as file, remembering(file) as stream:
                yield stream

    class Writer(dcp.FileSystemWriter):
        def storage_meta(self) -> None:
            """Leaves out the folder's path on this machine."""

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # A file of several tensors would be held in memory as a whole.
        writer = Writer(folder, single_file_per_rank=False, sync_files=False)
        writer.fs = Files()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
                dcp.save(state, storage_writer=writer, planner=Planner(), no_dist=True)
        except dcp.CheckpointException as error:  # wraps what failed
            for failure in error.failures.values():
                raise failure[0] from error
            raise
    write_sidecar(model, folder)


def _state_dict(model: StoredModel) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Any]]:
    """Returns what reads each tensor, by its name in the checkpoint, and the state dict with tensors without values."""
    readers: dict[str, Callable[[], Tensor]] = {}

    def empty(tensors: Tensors, name: str, path: str) -> Tensor:
        readers[path] = lambda: tensors[name].contiguous()
        return torch.empty(tensors.infos[name].shape, dtype=tensors.infos[name].dtype, device="meta")

    state: dict[str, Any] = {MODEL: {name: empty(model.tensors, name, f"{MODEL}.{name}") for name in model.tensors}}
    if model.optimizer is not None:
        moments = {kind: getattr(model.optimizer, kind) for kind in MOMENTS}
        step_of = {
            name: float(group.get("step", model.optimizer.step))
            for group in model.optimizer.groups
            for name in group["params"]
        }
        entries: dict[str, dict[str, Tensor]] = {}
        for name in model.optimizer.exp_avg:
            path = f"{OPTIMIZER}.{STATE}.{name}"
            entries[name] = {kind: empty(moments[kind], name, f"{path}.{kind}") for kind in MOMENTS}
            entries[name]["step"] = torch.tensor(step_of[name])
        groups = [
            {**DEFAULTS, **{key: value for key, value in group.items() if key != "step"}}
            for group in model.optimizer.groups
        ]
        state[OPTIMIZER] = {STATE: entries, GROUPS: groups}
    return readers, state


class _Source:
    """A checkpoint's metadata: `infos` of tensors and `paths` in the saved state dict, by name."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / METADATA
        try:
            content = _Unpickler(io.BytesIO(self._path.read_bytes())).load()
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        except Exception as error:  # a hostile file can make the unpickler raise anything
            raise self._damaged(error) from error
        try:
            self._take(content, folder)
        except (AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return CheckpointError(f"{self._path} is damaged or not of {_DCP} ({reason}); fetch it again")

    def _take(self, content: Any, folder: Path) -> None:
        places = {}
        for index, info in content.get("storage_data").items():
            places[index.get("fqn"), tuple(index.get("offset") or ())] = _piece(info, folder)
        paths = content.get("planner_data")
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for name, stored in content.get("state_dict_metadata").items():
            path = paths.get(name) if isinstance(paths, Mapping) else None
            self.paths[name] = tuple(path) if path else (name,)
            if stored.get("chunks") is None:
                self._pieces[name] = [places[name, ()]]
                continue
            # The state of TensorProperties is a tuple that begins with the type.
            dtype, shape = stored.get("properties").state[0], _sizes(stored.get("size"))
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has the type {dtype!r}")
            self.infos[name] = TensorInfo(shape, dtype)
            self._pieces[name] = [
                _block(places[name, tuple(chunk.get("offsets"))], chunk, name) for chunk in stored.get("chunks")
            ]
            _check_blocks(name, self.infos[name], self._pieces[name])

    def tensors(self) -> Tensors:
        return Tensors(self.infos, self._read)

    def optimizer(self, member: Callable[[str], str | None]) -> OptimizerState | None:
        """Returns the optimizer's state; None if a moment or the groups are missing.

        Args: member: returns the canonical name of a parameter, None if there is none."""
        entries: dict[str, dict[str, str]] = {kind: {} for kind in (*MOMENTS, "step")}
        values: dict[int, dict[str, Any]] = {}
        for name, path in self.paths.items():
            if STATE in path[:-2] and path[-1] in entries and (found := member(str(path[-2]))):
                entries[path[-1]][found] = name
            elif GROUPS in path[:-2] and isinstance(path[-2], int):
                values.setdefault(path[-2], {})[str(path[-1])] = self._value(name)
        groups = []
        for _, group in sorted(values.items()):
            names = [found for name in group.get("params") or () if (found := member(str(name)))]
            if not all(name in entries[kind] for name in names for kind in MOMENTS):
                return None
            if names:
                step = int(self._value(entries["step"][names[0]])) if names[0] in entries["step"] else 0
                groups.append({**group, "step": step, "params": names})
        if not groups:
            return None
        stored = self.tensors()
        moments = [
            Tensors(
                {name: self.infos[place] for name, place in entries[kind].items()},
                lambda name, kind=kind: stored[entries[kind][name]],
            )
            for kind in MOMENTS
        ]
        return OptimizerState(max(group["step"] for group in groups), *moments, groups)

    def _value(self, name: str) -> Any:
        return self._read(name) if name in self.infos else _load(self._pieces[name][0])

    def _read(self, name: str) -> Tensor:
        info, pieces = self.infos[name], self._pieces[name]
        whole = torch.zeros(info.shape, dtype=info.dtype)
        for piece in pieces:
            stored = _load(piece)
            if not isinstance(stored, Tensor) or tuple(stored.shape) != piece.sizes or stored.dtype != info.dtype:
                raise CheckpointError(f"{piece.file} has other content for {name} than its metadata; fetch it again")
            whole[tuple(slice(at, at + size) for at, size in zip(piece.at, piece.sizes, strict=True))] = stored.detach()
        return whole


def _piece(info: Any, folder: Path) -> _Piece:
    name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or Path(name).name != name or name in ("..", METADATA):
        raise ValueError(f"it names the file {name!r}; files must be in its own folder")
    if info.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed or encrypted, write it without extensions")
    if not (isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0):
        raise ValueError(f"{name} has the range {offset!r}, {length!r}")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"the file {name} is missing")
    if offset + length > path.stat().st_size:
        raise ValueError(f"the file {name} ends before byte {offset + length}")
    return _Piece(path, offset, length)


def _block(place: _Piece, chunk: Any, name: str) -> _Piece:
    return _Piece(place.file, place.offset, place.length, _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes")))


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{values!r} is not a shape")
    return tuple(values)


def _check_blocks(name: str, info: TensorInfo, pieces: list[_Piece]) -> None:
    """Raises: ValueError if blocks lie outside of the tensor, do not fill it, or are larger than what is stored."""
    for piece in pieces:
        ends = [at + size for at, size in zip(piece.at, piece.sizes, strict=True)]
        if len(ends) != len(info.shape) or any(end > side for end, side in zip(ends, info.shape, strict=True)):
            raise ValueError(f"a part of {name} is outside of the shape {info.shape}")
        if math.prod(piece.sizes) * info.dtype.itemsize > piece.length:
            raise ValueError(f"a part of {name} is larger than what is stored of it")
    if sum(math.prod(piece.sizes) for piece in pieces) != math.prod(info.shape):
        raise ValueError(f"the parts of {name} do not fill the shape {info.shape}")


def _load(piece: _Piece) -> Any:
    """Returns a stored tensor or value. Raises: CheckpointError if it is damaged or holds more than plain values."""
    try:
        with piece.file.open("rb") as file:
            file.seek(piece.offset)
            return torch.load(io.BytesIO(file.read(piece.length)), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        reason = first_line(error)[:300]
        raise CheckpointError(
            f"{piece.file} is damaged or holds more than tensors and plain values ({reason}); fetch it again"
        ) from error
