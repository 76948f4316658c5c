"""Reads images and videos that are in Parquet tables, row group by row group."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from univitar_ds.data.importing.parquet.table import BYTES, PATH, batch_rows, open_parquet
from univitar_ds.data.importing.rows import Cell, Fault, file_inside, short, table_stamp
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import DataError, SampleError

_MOST_GROUP_BYTES = 8 << 30
"""Maximum bytes of a column in a row group. Many writers make one page of it, which is decoded as a whole."""


class PassingError(SampleError):
    """A fault that may be gone although the table is the same: of a file that it names, or of the storage."""


def read_cells(
    cells: Iterable[Cell], root: Path, max_bytes: int
) -> Iterator[tuple[Cell, bytes | memoryview | SampleError]]:
    """Yields the media of cells, or why it cannot be read, in the order of tables and rows.

    The memory is about twice the column in a row group. A cell without bytes, but with a path, names a file inside
    `root`, as in a table of paths; its content is `bytes`, that of a cell a `memoryview`. Contents are valid until the
    next one is taken.

    Args: max_bytes: maximum size of a file.
    Raises: DataError if a table is no longer there or has changed, or a row group is too large.
    """
    for (path, column, stamp), some in groupby(sorted(cells), key=lambda cell: (cell.file, cell.column, cell.stamp)):
        _check_unchanged(path, stamp)
        file = open_parquet(Path(path))
        first, wanted = 0, list(some)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            start, end = (bisect_left(wanted, row, key=lambda cell: cell.row) for row in (first, first + rows))
            if start < end:
                _check_size(path, file, group, column)
                yield from _of_group(file, group, first, wanted[start:end], root, max_bytes)
            first += rows
        _check_unchanged(path, stamp)


def _of_group(
    file: Any, group: int, first: int, cells: list[Cell], root: Path, max_bytes: int
) -> Iterator[tuple[Cell, bytes | memoryview | SampleError]]:
    """Yields the cells of a row group. Damage costs the rest of the group."""
    from pyarrow import ArrowException

    left = iter(cells)
    cell = next(left)
    start = first
    try:
        batches = file.iter_batches(batch_rows(file, [group]), [group], columns=[cell.column], use_threads=False)
        for batch in batches:
            contents, paths = _columns(batch)
            while cell is not None and cell.row < start + batch.num_rows:
                index = cell.row - start
                yield cell, _content(contents[index], paths and paths[index], cell, root, max_bytes)
                cell = next(left, None)
            start += batch.num_rows
            if cell is None:
                return
        problem = "the table has fewer rows than its footer says"
    except (OSError, ArrowException) as error:
        problem = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    for one in (cell, *left):
        detail = f"row group {group} of its table cannot be read from row {start} on ({problem}); restore the table"
        yield one, PassingError("corrupt", detail)


def _columns(batch: Any) -> tuple[Any, Any]:
    """Returns the bytes and the paths of a batch of one column. The paths are None if there are none."""
    column = batch.column(0)
    column = getattr(column, "storage", column)
    if hasattr(column, "dictionary_decode"):
        column = column.dictionary_decode()
    if not str(column.type).startswith("struct<"):
        return column, None
    names = [column.type.field(index).name for index in range(column.type.num_fields)]
    children = dict(zip(names, column.flatten(), strict=True))  # children of a null are null too
    return children[BYTES], children.get(PATH)


def _content(value: Any, path: Any, cell: Cell, root: Path, max_bytes: int) -> bytes | memoryview | SampleError:
    try:
        if value.is_valid:
            content = memoryview(value.as_buffer()).cast("B")
            if len(content) > max_bytes:
                return SampleError("too_large", f"the file has {len(content)} bytes (limit {max_bytes})")
            if not len(content):
                return SampleError("no_media", f"column {cell.column} has no byte in this row")
            return content
        name = None if path is None else path.as_py()
        if name is None:
            return SampleError("no_media", f"column {cell.column} is null in this row")
        return _outside(name, cell, root, max_bytes)
    except UnicodeDecodeError:
        return SampleError("no_media", f"column {cell.column} has no bytes, and a path that is not UTF-8")


def _outside(name: str, cell: Cell, root: Path, max_bytes: int) -> bytes | PassingError:
    """Returns the content of a file that a cell names."""
    try:
        file = file_inside(root, name, Path(cell.start), Path(cell.file).parent)
        return read_file(root / file, max_bytes, f" (limit {max_bytes})")
    except SampleError as error:
        return PassingError(error.kind, str(error))
    except Fault as fault:
        return PassingError("no_media", f"column {cell.column} has a path but no bytes: {fault}")


def _check_unchanged(path: str, stamp: tuple[int, int]) -> None:
    """Raises DataError if a table has changed since its records were read: a row may have other media now."""
    if table_stamp(path) != stamp:
        raise DataError(f"{path} changed while it was being read; try again when nothing writes to the table")


def _check_size(path: str, file: Any, group: int, column: str) -> None:
    """Raises DataError if a row group is too large to be decoded."""
    about = file.metadata.row_group(group)
    for index in range(about.num_columns):
        part = about.column(index)
        if part.path_in_schema in (column, f"{column}.{BYTES}") and part.total_uncompressed_size > _MOST_GROUP_BYTES:
            raise DataError(
                f"{path}: column {short(column)} has {part.total_uncompressed_size} bytes in row group {group} (limit "
                f"{_MOST_GROUP_BYTES}), which are decoded together; write the table with smaller row groups"
            )
