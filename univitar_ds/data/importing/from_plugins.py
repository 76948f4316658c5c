"""Source formats that plugins register. A plugin's function yields rows, which are checked like those of a table."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from univitar_ds import plugins
from univitar_ds.data.importing.forms import Format
from univitar_ds.data.importing.records import Record, Table
from univitar_ds.data.importing.rows import Collected, Listing, ReadOptions, short
from univitar_ds.data.importing.tables import Keys, Reading, add_records
from univitar_ds.errors import DataError, PluginError
from univitar_ds.plugins import Reader, calling

_FIELDS = ("file", "caption", "captions", "label", "split", "set")
_KEYS = Keys("file", ("caption", "captions"), "label", "split", "set")


def reads(source: str) -> bool:
    """Whether the reader of a plugin reads this source."""
    return any(reader.reads(source) for reader in plugins.readers())


def formats(taken: Collection[str]) -> dict[str, Format]:
    """Returns the formats of the loaded plugins. Raises: PluginError if one has a name in `taken`."""
    found = {}
    for reader in plugins.readers():
        if reader.name in taken:
            raise PluginError(
                f"the plugin {reader.plugin.place} registers the reader {reader.name}, and a format of this name "
                "exists; rename the reader"
            )
        title = f"{reader.name} (plugin {reader.plugin.name})"
        found[reader.name] = Format(title, reader.reads, partial(_rows, reader), reader.uses | {"images"})
    return found


def _rows(reader: Reader, source: str, options: ReadOptions) -> Listing:
    """Returns the rows of a plugin's reader. Rows with a fault are left out.

    Raises: DataError if the folder of the files is missing, or there is no row without a fault; PluginError if the
        plugin fails.
    """
    remote = "://" in source
    if not remote and not os.path.exists(source):
        raise DataError(f"{source}: there is no such file or folder; check the path")
    if remote and options.images is None:
        root = Path.cwd()
    else:
        root = options.images or (Path(source) if os.path.isdir(source) else Path(source).absolute().parent)
    if not root.is_dir():
        raise DataError(f"--images {root}: is not a folder; name the folder in which the paths of {source} start")
    collected = Collected(root)
    table = Table(list(_FIELDS), _records(reader, source, options))
    add_records(collected, source, table, _KEYS, Reading(root, root, options.default_split))
    return collected.listing(source)


def _records(reader: Reader, source: str, options: ReadOptions) -> Iterator[Record]:
    """Yields the rows of the plugin's function. Only code of the plugin runs within `calling`."""
    with calling(reader.plugin, f"the reader {reader.name} of {source}"):
        rows = iter(reader.rows(source, options))
    number = 0
    while True:
        with calling(reader.plugin, f"the reader {reader.name} of {source}, after row {number}"):
            row = next(rows, None)
        if row is None:
            return
        number += 1
        yield Record(f"row {number}", _fields(row))


def _fields(row: Any) -> dict[str, Any] | str:
    """Returns the fields of a row, or a message if it is invalid."""
    if not isinstance(row, Mapping):
        return f"{short(row)} is not a mapping with file and caption or label"
    if unknown := [name for name in row if name not in _FIELDS]:
        return f"unknown field {short(unknown[0])}; fields are {', '.join(_FIELDS)}"
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}
    return fields | {"file": os.fspath(fields["file"])} if isinstance(fields.get("file"), os.PathLike) else fields
