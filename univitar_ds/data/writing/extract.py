"""Extracts images and videos that are in tables into one file of the workspace.

Shards hold samples in the order of a hash, but a table can be read only row group by row group. So the media are copied
once, in the order of the table, and then read like members of a tar. An interrupted packing continues the copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from univitar_ds.data.importing.parquet.media import PassingError, read_cells
from univitar_ds.data.importing.rows import Cell, Part, Row
from univitar_ds.data.writing.examine import MOST_BYTES
from univitar_ds.data.writing.progress_log import EXTRACTED, ProgressLog
from univitar_ds.errors import SampleError
from univitar_ds.screen import progress_bar

_SAVED_BYTES = 64 << 20
"""Number of bytes after which the copy is safe on the disk, and entered in the progress log."""


class Extracted(NamedTuple):
    """The copies of media that are in tables, and the reasons for those that cannot be read, both by the file of their
    row. `passing`: files of rows whose result the stamp of the table does not cover, because they are in a file that it
    names, or the storage may have failed."""

    parts: dict[str, Part]
    faults: dict[str, str]
    passing: set[str]


def stamp_of(root: Path, row: Row) -> list[Any]:
    """Returns size and modification time of the file that holds a row's media, and the place in it. Those of a table
    are from before its records were read.

    Raises: OSError if there is no such file.
    """
    if isinstance(row.part, Cell):
        return [*row.part.stamp, row.part.column, row.part.row]
    state = os.stat(row.place(root))
    return [state.st_size, state.st_mtime_ns, *(row.part or ())[1:]]


def extracted(root: Path, workspace: Path, progress_log: ProgressLog, progress: bool, rows: Sequence[Row]) -> Extracted:
    """Copies the media of `rows` that are in tables and not copied yet.

    Args: root: of the listing of `rows`; progress: whether to show a bar.
    Raises: DataError as `parquet.media.read_cells`.
    """
    cells = {row.part: row for row in rows if isinstance(row.part, Cell)}
    path = workspace.absolute() / EXTRACTED
    if not path.is_file() or path.stat().st_size < progress_log.extracted_end():
        progress_log.forget_extracted()
    known = {cell: progress_log.extracted(row.file, stamp_of(root, row)) for cell, row in cells.items()}
    parts = {cells[cell].file: Part(str(path), *place) for cell, place in known.items() if place is not None}
    missing = [cell for cell, place in known.items() if place is None]
    if not missing:
        return Extracted(parts, {}, set())
    with progress_bar(total=len(missing), desc="extract", unit="file", disable=not progress) as bar:
        copied = _copy(missing, cells, root, path, progress_log, bar.update)
    return copied._replace(parts=parts | copied.parts)


def _copy(
    missing: Sequence[Cell],
    rows: dict[Cell, Row],
    root: Path,
    path: Path,
    progress_log: ProgressLog,
    update: Callable[[], Any],
) -> Extracted:
    parts, faults, passing = found = Extracted({}, {}, set())
    unsaved: list[Row] = []
    with path.open("ab") as stream:
        stream.truncate(progress_log.extracted_end())  # an interrupted copy may have more
        stream.seek(0, os.SEEK_END)
        saved = stream.tell()

        def save() -> None:
            stream.flush()
            os.fsync(stream.fileno())
            for row in unsaved:
                progress_log.add_extracted(row.file, stamp_of(root, row), *parts[row.file][1:])
            unsaved.clear()

        for cell, content in read_cells(missing, root, MOST_BYTES):
            row = rows[cell]
            update()
            if isinstance(content, SampleError):
                faults[row.file] = f"{content.kind}: {content}"
                if isinstance(content, PassingError):
                    passing.add(row.file)
                continue
            parts[row.file] = Part(str(path), stream.tell(), len(content))
            stream.write(content)
            if isinstance(content, bytes):
                passing.add(row.file)
            else:
                unsaved.append(row)
            if stream.tell() - saved > _SAVED_BYTES:
                save()
                saved = stream.tell()
        save()
    return found
