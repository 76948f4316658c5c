"""Writes the features of a part to one file as they are computed: safetensors or Parquet.

A file gets its name when it is complete. Equal rows give files with equal bytes.

safetensors, all float32: `embedding` (N, E), or `mean` (N, D), or `tokens` (T, D) with `offsets` (N + 1,) int64 (item i
has the tokens offsets[i] to offsets[i + 1]) and `grid_thw` (N, 3) int64.
Parquet: a row for each item with `key` and `embedding`, or `mean`, or `tokens` (a list of vectors) and `grid_thw`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from univitar_ds.atomic_write import move_into_place
from univitar_ds.errors import writing
from univitar_ds.extras import extra
from univitar_ds.geometry import cumulative, token_count
from univitar_ds.inference.reading import Kind, Rows

SUFFIXES = (".safetensors", ".parquet")
HEADER = 1024
"""Bytes reserved for the header of a safetensors file, which is written last."""
_GROUP_BYTES = 64 << 20
"""Bytes of features in a row group of a Parquet file; the rows of a unit are not divided."""


class Part(Protocol):
    """A part that is being written. Raises: StorageError if the storage fails."""

    def add(self, rows: Rows) -> None:
        """Appends the features of a unit."""

    def finish(self) -> None:
        """Completes the file and gives it its name."""

    def drop(self) -> None:
        """Removes what is written so far."""


def open_part(path: Path, kind: Kind, width: int) -> Part:
    """Returns a new part. Args: width: number of values of a vector.

    Raises: StorageError if the file cannot be written; InstallationError for a Parquet file without pyarrow.
    """
    return (SafetensorsPart if path.suffix == ".safetensors" else ParquetPart)(path, kind, width)


def check_suffix(path: Path) -> None:
    """Checks that parts with the suffix of `path` can be written. Raises: InstallationError as `open_part`."""
    if path.suffix == ".parquet":
        _pyarrow()


class SafetensorsFile:
    """A safetensors file that is written as its values are computed, and its header last, into HEADER bytes."""

    def __init__(self, path: Path) -> None:
        """Raises: StorageError, as the methods do, if the storage fails."""
        self._path, self._partial = path, _partial(path)
        with writing(path):
            self._file: BinaryIO = self._partial.open("wb")
            self._file.write(bytes(HEADER))

    def append(self, values: np.ndarray) -> None:
        """Writes the bytes of a C-contiguous array."""
        with writing(self._path):
            self._file.write(values.data)

    def complete(self, header: dict[str, Any], rest: bytes) -> None:
        """Writes the last bytes and the header, and gives the file its name."""
        text = json.dumps(header).encode().ljust(HEADER - 8)
        assert len(text) == HEADER - 8, header
        with writing(self._path):
            self._file.write(rest)
            self._file.seek(0)
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._file.close()
            move_into_place(self._partial, self._path, durable=True)

    def drop(self) -> None:
        """Removes what is written so far."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class SafetensorsPart(SafetensorsFile):
    """A part as safetensors. Vectors are written immediately, so that memory does not grow with the part.

    Args: grids: whether `grid_thw` is stored for vectors too."""

    def __init__(self, path: Path, kind: Kind, width: int, *, grids: bool = False) -> None:
        super().__init__(path)
        self._kind, self._width, self._with_grids = kind, width, grids
        self._vectors = 0
        self._grids: list[tuple[int, int, int]] = []

    def add(self, rows: Rows) -> None:
        self.append(np.ascontiguousarray(rows.values, "<f4"))
        self._vectors += len(rows.values)
        self._grids += rows.grids

    def finish(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        size = 4 * self._vectors * self._width
        header[self._kind] = _about("F32", [self._vectors, self._width], 0, size)
        rest = b""
        grids = np.array(self._grids, "<i8").reshape(-1, 3)
        if self._kind == "tokens":
            offsets = np.array(cumulative(list(map(token_count, self._grids))), "<i8")
            rest = offsets.tobytes()
            header["offsets"] = _about("I64", [len(offsets)], size, size + len(rest))
        if self._kind == "tokens" or self._with_grids:
            begin, rest = size + len(rest), rest + grids.tobytes()
            header["grid_thw"] = _about("I64", [len(grids), 3], begin, size + len(rest))
        self.complete(header, rest)


class ParquetPart:
    """A part as Parquet. Memory holds the rows of one row group."""

    def __init__(self, path: Path, kind: Kind, width: int) -> None:
        pyarrow, parquet = _pyarrow()
        self._arrow, self._path, self._kind = pyarrow, path, kind
        vector = pyarrow.list_(pyarrow.float32(), width)
        fields = [("key", pyarrow.string())]
        if kind == "tokens":
            fields += [("grid_thw", pyarrow.list_(pyarrow.int32(), 3)), ("tokens", pyarrow.list_(vector))]
        else:
            fields += [(kind, vector)]
        self._schema = pyarrow.schema(fields)
        self._partial = _partial(path)
        self._waiting: list[Rows] = []
        with writing(path):
            self._writer = parquet.ParquetWriter(self._partial, self._schema, compression="zstd")

    def add(self, rows: Rows) -> None:
        self._waiting.append(rows)
        if sum(one.values.nbytes for one in self._waiting) >= _GROUP_BYTES:
            self._write()

    def finish(self) -> None:
        self._write()
        with writing(self._path):
            self._writer.close()
            move_into_place(self._partial, self._path, durable=True)

    def drop(self) -> None:
        self._writer.close()
        self._partial.unlink(missing_ok=True)

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        arrow = self._arrow
        values = np.concatenate([one.values for one in waiting])
        vectors = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), values.shape[1])
        grids = [grid for one in waiting for grid in one.grids]
        # File names may be invalid UTF-8.
        keys = arrow.array([key.encode("utf-8", "backslashreplace").decode() for one in waiting for key in one.keys])
        columns = [keys.cast(arrow.string())]
        if self._kind == "tokens":
            flat = arrow.array(np.array(grids, np.int32).reshape(-1))
            offsets = arrow.array(np.array(cumulative(list(map(token_count, grids))), np.int32))
            columns += [arrow.FixedSizeListArray.from_arrays(flat, 3), arrow.ListArray.from_arrays(offsets, vectors)]
        else:
            columns += [vectors]
        with writing(self._path):
            self._writer.write_table(arrow.Table.from_arrays(columns, schema=self._schema))


def _pyarrow() -> tuple[Any, Any]:
    with extra("parquet"):
        import pyarrow
        import pyarrow.parquet as parquet
    return pyarrow, parquet


def _partial(path: Path) -> Path:
    """Returns the name of the incomplete file, the same as of `atomic_write.replacing`. Removes an earlier one."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        partial.unlink(missing_ok=True)
    return partial


def _about(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
