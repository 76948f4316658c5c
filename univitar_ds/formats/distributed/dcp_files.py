"""Reads the files of `torch.distributed.checkpoint` (DCP), which Megatron-Core writes too, one tensor at a time.

    .metadata        names, shapes and places of everything, a pickle
    __0_0.distcp     tensors and values, each as by `torch.save`

`.metadata` is read with an unpickler that knows only the names in `_STAND_INS` and replaces each by a class or function
that does nothing; a file that names anything else is rejected.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from univitar_ds.errors import CheckpointError
from univitar_ds.formats.stored_model import TensorInfo, Tensors
from univitar_ds.formats.weight_files import load_plain
from univitar_ds.regular_files import read_bytes

METADATA = ".metadata"
DCP = "torch.distributed.checkpoint"
StandIns = Mapping[tuple[str, str], str]
"""Names that `.metadata` may have besides torch's types and sizes, each with its stand-in ("" for `_nothing`)."""
_STAND_INS: StandIns = {
    **{
        (f"{DCP}.metadata", name): name
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta",
        )
    },
    (f"{DCP}.filesystem", "_StorageInfo"): "_StorageInfo",
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): "",
    ("torch.serialization", "_get_layout"): "",
}  # fmt: skip


class Fields:
    """Stands in for a class: keeps an object's attributes and does nothing."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, "state", {}).get(name, default)


def _nothing(*_: Any) -> None:
    """Stands in for a function and for classes whose objects are not needed."""


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`. Each unpickler creates its own stand-ins, since a pickle may change their attributes."""

    def __init__(self, file: io.BytesIO, stand_ins: StandIns) -> None:
        super().__init__(file)
        self._stand_ins = stand_ins
        self._classes = {name: type(name, (Fields,), {}) for name in stand_ins.values() if name}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._stand_ins:
            return self._classes.get(self._stand_ins[module, name], _nothing)
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"the metadata needs {module}.{name} to be read, which could run code; no metadata of {DCP} names "
            f"{module}.{name}. Save the checkpoint without it."
        )


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor, or a value: `length` bytes of `file` from `offset`, for the block `sizes` from `at`."""

    file: Path
    offset: int
    length: int
    at: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    def overlaps(self, other: _Piece) -> bool:
        return all(
            mine < there + length and there < mine + own
            for mine, own, there, length in zip(self.at, self.sizes, other.at, other.sizes, strict=True)
        )


class DcpFiles:
    """The files of a checkpoint: `infos` of its tensors, and the `paths` of all entries in the saved state dict, by
    name."""

    def __init__(self, folder: Path, further: StandIns | None = None) -> None:
        """Args: further: names that `.metadata` may have besides those of every checkpoint.

        Raises: CheckpointError if the metadata is damaged, names code, or does not fit the files."""
        self._path = folder / METADATA
        try:
            stand_ins = {**_STAND_INS, **(further or {})}
            content = _Unpickler(io.BytesIO(read_bytes(self._path)), stand_ins).load()
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        except Exception as error:  # a hostile file can make the unpickler raise anything
            raise self._damaged(error) from error
        try:
            self._take(content, folder)
        except (AttributeError, LookupError, TypeError, ValueError, OSError, RecursionError) as error:
            raise self._damaged(error) from error

    def tensors(self) -> Tensors:
        """Returns the tensors, which are read when accessed."""
        return Tensors(self.infos, self._read)

    def value(self, name: str) -> Any:
        """Returns a tensor or value. Raises: CheckpointError if it is damaged or not stored."""
        if name in self.infos:
            return self._read(name)
        if name not in self._pieces:
            raise CheckpointError(f"{self._path} does not say where {name} is stored; fetch it again")
        return _load(self._pieces[name][0])

    def _damaged(self, error: Exception) -> CheckpointError:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return CheckpointError(f"{self._path} is damaged or not of {DCP} ({reason}); fetch it again")

    def _take(self, content: Any, folder: Path) -> None:
        places = {}
        for index, info in content.get("storage_data").items():
            places[index.get("fqn"), tuple(index.get("offset") or ())] = info
        paths = content.get("planner_data")
        self.paths: dict[str, tuple[Any, ...]] = {}
        self.infos: dict[str, TensorInfo] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        for name, stored in content.get("state_dict_metadata").items():
            if not isinstance(name, str):
                raise ValueError(f"{name!r:.80} is no name")
            path = paths.get(name) if isinstance(paths, Mapping) else None
            self.paths[name] = tuple(path) if path else (name,)
            if stored.get("chunks") is None:
                if (name, ()) in places:  # else an object of another program, which nothing here reads
                    self._pieces[name] = [_piece(places[name, ()], folder)]
                continue
            # The state of TensorProperties is a tuple that begins with the type.
            dtype, shape = stored.get("properties").state[0], _sizes(stored.get("size"))
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has the type {dtype!r}")
            self.infos[name] = TensorInfo(shape, dtype)
            self._pieces[name] = [
                _block(_piece(places[name, tuple(chunk.get("offsets"))], folder), chunk)
                for chunk in stored.get("chunks")
            ]
            _check_blocks(name, self.infos[name], self._pieces[name])

    def _read(self, name: str) -> Tensor:
        info, pieces = self.infos[name], self._pieces[name]
        parts = (self._part(name, piece, info.dtype) for piece in pieces)
        if len(pieces) == 1:
            return next(parts)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for piece, part in zip(pieces, parts, strict=True):
            whole[tuple(slice(at, at + size) for at, size in zip(piece.at, piece.sizes, strict=True))] = part
        return whole

    def _part(self, name: str, piece: _Piece, dtype: torch.dtype) -> Tensor:
        stored = _load(piece)
        if not isinstance(stored, Tensor) or tuple(stored.shape) != piece.sizes or stored.dtype != dtype:
            raise CheckpointError(f"{piece.file} has other content for {name} than its metadata; fetch it again")
        return stored.detach()


def _piece(info: Any, folder: Path) -> _Piece:
    name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or Path(name).name != name or name in ("..", METADATA):
        raise ValueError(f"it names the file {name!r}; files must be in its own folder")
    if extensions := info.get("transform_descriptors"):
        raise ValueError(f"{name} is compressed or encrypted ({extensions!r:.80}), write it without extensions")
    if not all(type(number) is int and number >= 0 for number in (offset, length)):
        raise ValueError(f"{name} has the range {offset!r}, {length!r}, which are no lengths")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"the file {name} is missing")
    if offset + length > path.stat().st_size:
        raise ValueError(f"the file {name} ends before byte {offset + length}; {length} bytes from {offset} are needed")
    return _Piece(path, offset, length)


def _block(place: _Piece, chunk: Any) -> _Piece:
    return _Piece(place.file, place.offset, place.length, _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes")))


def _sizes(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values!r:.80} is not a shape")
    return tuple(values)


def _check_blocks(name: str, info: TensorInfo, pieces: list[_Piece]) -> None:
    """Raises: ValueError if blocks lie outside of the tensor, do not fill it once, or exceed what is stored."""
    for piece in pieces:
        ends = [at + size for at, size in zip(piece.at, piece.sizes, strict=True)]
        if len(ends) != len(info.shape) or any(end > side for end, side in zip(ends, info.shape, strict=True)):
            raise ValueError(f"a part of {name} is outside of the shape {info.shape}")
        if math.prod(piece.sizes) * info.dtype.itemsize > piece.length:
            raise ValueError(f"a part of {name} is larger than the {piece.length} bytes that are stored of it")
    filled = sum(math.prod(piece.sizes) for piece in pieces)
    if filled != math.prod(info.shape) or any(one.overlaps(other) for one, other in combinations(pieces, 2)):
        raise ValueError(f"the parts of {name} do not fill it once; its shape is {info.shape}")


def _load(piece: _Piece) -> Any:
    try:
        with piece.file.open("rb") as file:
            file.seek(piece.offset)
            content = io.BytesIO(file.read(piece.length))
    except OSError as error:
        raise CheckpointError(f"{piece.file} cannot be read ({error.strerror}); fetch it again") from error
    return load_plain(content, piece.file)
