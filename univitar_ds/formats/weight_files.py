"""Weights in `model.safetensors` or `pytorch_model.bin`, in one file or in shards with an `.index.json`.

Only tensors are unpickled. Tensors are read one at a time, and a file is open only while a tensor is read, so that the
memory of a conversion does not grow with the model.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from univitar_ds.atomic_write import replace_text, replacing
from univitar_ds.config.encoder import read_object
from univitar_ds.errors import CheckpointError, first_line, writing
from univitar_ds.formats.checkpoint.shared_file import DTYPES
from univitar_ds.formats.stored_model import TensorInfo, Tensors
from univitar_ds.regular_files import is_regular

SAFE = "model.safetensors"
BIN = "pytorch_model.bin"
MAX_NAMED = 8
"""Maximum number of names that a message lists."""


def open_weights(folder: str | Path) -> Tensors:
    """Returns all tensors in `folder`. Raises: CheckpointError if there are none or a file is damaged."""
    files = weight_files(Path(folder))
    infos: dict[str, TensorInfo] = {}
    file_of: dict[str, Path] = {}
    for path in files:
        for name, info in _infos(path).items():
            if name in infos:
                raise CheckpointError(f"{name} is in {file_of[name]} and in {path}; remove the wrong file")
            infos[name], file_of[name] = info, path
    return Tensors(infos, lambda name: _read(file_of[name], name))


def weight_files(folder: Path) -> list[Path]:
    """Returns the files with the weights in `folder`, in order.

    Raises: CheckpointError if there are none, a shard is missing, or an index names a file outside of the folder."""
    for name in (SAFE, BIN):
        if is_regular(folder / name):
            return [folder / name]
        index = folder / f"{name}.index.json"
        if is_regular(index):
            return _shards(folder, index)
    raise CheckpointError(f"{folder} holds neither {SAFE} nor {BIN}; name a folder with an encoder's weights")


def write_weights(tensors: Tensors, folder: Path, *, shard_bytes: int | None = None, safe: bool = True) -> None:
    """Writes tensors to `model.safetensors` or `pytorch_model.bin`, or to shards with an index.

    At most one file's tensors are in memory at a time. Files of the other format or number of shards are removed, so
    that no reader takes them instead.

    Args: shard_bytes: maximum size of the tensors in a file; a larger tensor gets a file of its own. None: one file.
        safe: whether to write safetensors.
    Raises: StorageError if the folder cannot be written.
    """
    base = SAFE if safe else BIN
    stem, suffix = base.split(".")
    groups = list(_groups(tensors, shard_bytes))
    names = [base] if len(groups) == 1 else [
        f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, group in zip(names, groups, strict=True):
        state = {key: tensors[key].contiguous() for key in group}
        with replacing(folder / name) as path:
            if safe:
                save_tensors(state, path, metadata={"format": "pt"})
            else:
                save_pt(state, path)
        del state
    if len(groups) > 1:
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map}
        replace_text(folder / f"{base}.index.json", json.dumps(index, indent=2) + "\n")
    written = {*names, f"{base}.index.json"} if len(groups) > 1 else set(names)
    for path in folder.iterdir():
        if WEIGHT_NAME.fullmatch(path.name) and path.name not in written:
            path.unlink()


WEIGHT_NAME = re.compile(
    r"(model(-\d{5}-of-\d{5})?\.safetensors|pytorch_model(-\d{5}-of-\d{5})?\.bin)|"
    r"(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
"""Names of the files that `write_weights` writes."""


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a safetensors file with the permissions of any new file (the library would set 0600). Returns `path`.

    Raises: OSError with the system's error number.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
    return path


class _Remembering(io.RawIOBase):
    """A file that keeps the error of a failed write. torch.export takes only subclasses of IOBase without a warning."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return self._file.seekable()

    def writable(self) -> bool:
        return True


@contextmanager
def remembering(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yields a wrapper of `file` for torch.save that keeps the system's error of a failed write.

    Raises: OSError if the file cannot be written. torch.save would raise a RuntimeError without the error's number.
    """
    watched = _Remembering(file)
    try:
        yield watched
    except RuntimeError as error:
        if watched.error is None:
            raise
        raise watched.error from error


def save_pt(content: Any, path: Path) -> None:
    """Writes a file by torch.save. Raises: OSError with the system's error number."""
    with path.open("wb") as file, remembering(file) as stream:
        torch.save(content, stream)


def some(names: list[str]) -> str:
    """Returns names as text; at most `MAX_NAMED`, since a wrong model would otherwise fill the screen."""
    hidden = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {hidden} more" if hidden > 0 else "")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Wraps code that reads a file of weights. Raises: CheckpointError for the errors of a damaged file."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors ({first_line(error)}); fetch it again"
        ) from error


def _infos(path: Path) -> dict[str, TensorInfo]:
    if path.suffix == ".bin":
        return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in _load_bin(path).items()}
    infos = {}
    with reading(path), safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, not a dict
            part = file.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise ValueError(f"{name} has the type {part.get_dtype()}")
            infos[name] = TensorInfo(tuple(part.get_shape()), dtype)
    return infos


def _read(path: Path, name: str) -> Tensor:
    if path.suffix == ".bin":
        return _load_bin(path)[name].detach().clone()
    with reading(path), safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _load_bin(path: Path) -> dict[str, Tensor]:
    state = load_plain(path, path)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} must hold tensors by name, got {type(state).__name__}")
    others = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path} holds entries that are no tensors: {some(others)}; save the weights alone")
    return state


def load_plain(content: io.BytesIO | Path, path: Path) -> Any:
    """Returns the tensors and plain values in what torch.save wrote; tensors of a file are mapped if torch can do it.

    Raises: CheckpointError, with the first other name in it, if it is damaged or holds anything else."""
    try:
        mapped = isinstance(content, Path) and _is_zip(content)
        return torch.load(content, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a hostile file can make the unpickler raise anything
        # torch's own message proposes to run what the file names.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, which could run code" if named else first_line(error)[:300]
        raise CheckpointError(
            f"{path} is damaged or holds more than tensors and plain values ({reason}); fetch it again"
        ) from error


def _is_zip(path: Path) -> bool:
    """Returns whether torch can map the file. Files of torch before 1.6 cannot be mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _shards(folder: Path, index: Path) -> list[Path]:
    file_of = read_object(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise CheckpointError(f"{index} has no weight_map from names to files; fetch it again")
    paths = []
    for name in sorted(set(file_of.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index} names {name[:80]!r}; shards must be in its own folder")
        if not os.path.isfile(folder / name):  # Path.is_file raises for a name that is too long
            raise CheckpointError(f"{folder} lacks {name[:80]}, which {index.name} names; fetch it again")
        paths.append(folder / name)
    return paths


def _groups(tensors: Tensors, shard_bytes: int | None) -> Iterator[list[str]]:
    """Yields the names of the tensors in each file."""
    group: list[str] = []
    size = 0
    for name, info in tensors.infos.items():
        if group and shard_bytes is not None and size + info.nbytes > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += info.nbytes
    yield group
