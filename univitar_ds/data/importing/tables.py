"""Lists the media files that a table names, with captions and labels from its columns.

Relative paths start in the folder of the table, or in the folder `images`. All paths, also absolute ones, must be
inside this folder. Several rows of one file are joined, as in tables with one caption per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from univitar_ds.data.importing.rows import (
    SPLIT_FOLDERS,
    Collected,
    Fault,
    Listing,
    ReadOptions,
    Row,
    captions_of,
    checked_split,
    file_inside,
    label_of,
    short,
)
from univitar_ds.data.importing.table_files import EXTENSIONS, Table, read_table
from univitar_ds.errors import DataError

_IMAGE_KEYS = (
    *("file_name", "file", "filename", "filepath", "file_path", "image_path", "video_path", "path"),
    *("image", "img", "video"),
)
_CAPTION_KEYS = ("captions", "caption", "text", "title")
_LABEL_KEYS = ("label", "class")
_SPLIT_KEY, _SET_KEY = "split", "set"


class Keys(NamedTuple):
    """Columns of a table: of paths, captions, label, split and set. The last three are None if there is no column."""

    image: str
    captions: tuple[str, ...]
    label: str | None
    split: str | None
    set: str | None


class Reading(NamedTuple):
    """Settings for turning the records of a table into rows.

    `start`: folder of relative paths; `above`: folder of those that begin with `..`; `default_split`: split of records
    that name none; `split_folders`: whether a first folder with the name of a split is one.
    """

    start: Path
    above: Path
    default_split: str
    split_folders: bool = False


def recognises(source: str) -> bool:
    """Whether the name of a source is that of a table."""
    return Path(source).suffix.lower() in EXTENSIONS and not Path(source).is_dir()


def rows(source: str, options: ReadOptions, form: str | None = None) -> Listing:
    """Returns the rows of a table. `form`: see `table_files.read_table`. Lines with a fault are left out.

    Raises: DataError if the table cannot be read, lacks a column, or has no row without a fault.
    """
    path = Path(source)
    root = path.parent if options.images is None else options.images
    if not root.is_dir():
        raise DataError(f"--images {root}: is not a folder; name the folder in which the paths of {path} start")
    collected = Collected(root)
    table = read_table(path, form)
    keys = keys_of(path, table.columns, options)
    add_records(collected, path.name, table, keys, Reading(root, path.parent, options.default_split))
    return collected.listing(path)


def keys_of(path: Path, columns: Sequence[str], options: ReadOptions) -> Keys:
    """Returns the columns to read. Raises: DataError that lists the columns if one is missing."""
    there = f"{path} has the columns {', '.join(columns)}" if columns else f"{path} has no row"
    asked = {"--image-key": options.image_key, "--label-key": options.label_key, "--split-key": options.split_key}
    wanted = [(name, key) for name, key in asked.items() if key is not None]
    wanted += [("--caption-key", key) for key in options.caption_keys]
    for name, key in wanted:
        if key not in columns:
            raise DataError(f"{name} {key!r}: there is no such column; {there}")
    image = options.image_key or _first(_IMAGE_KEYS, columns)
    captions = options.caption_keys or tuple(filter(None, [_first(_CAPTION_KEYS, columns)]))
    label = options.label_key or _first(_LABEL_KEYS, columns)
    if image is None:
        raise DataError(f"{there}; name the one with paths of images or videos: --image-key NAME")
    if not captions and label is None:
        raise DataError(f"{there}; name the one with captions or labels: --caption-key NAME or --label-key NAME")
    split = options.split_key or _first([_SPLIT_KEY], columns)
    return Keys(image, captions, label, split, _first([_SET_KEY], columns))


def _first(names: Iterable[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def add_records(collected: Collected, name: str, table: Table, keys: Keys, form: Reading) -> None:
    """Adds a row for each record of a table. `name`: name of the table in messages."""
    for record in table.records:
        where = f"{name}, {record.place}"
        try:
            if isinstance(record.fields, str):
                raise Fault(record.fields)
            collected.add(_row(collected.root, record.fields, keys, form), where)
        except Fault as fault:
            collected.left_out[where] = str(fault)


def _row(root: Path, fields: dict[str, Any], keys: Keys, form: Reading) -> Row:
    value = fields.get(keys.image)
    if value is None or value == "":
        raise Fault(f"no file in {keys.image}; it has {', '.join(map(str, list(fields)[:20])) or 'no field'}")
    if isinstance(value, bytes | dict):
        raise Fault(f"column {keys.image} holds the media itself, not paths; export it to files or WebDataset tars")
    file = file_inside(root, value, form.start, form.above)
    captions = tuple(dict.fromkeys(text for key in keys.captions for text in captions_of(fields.get(key))))
    label = None if keys.label is None else label_of(fields.get(keys.label))
    if not captions and label is None:
        raise Fault("no_caption: it has neither a caption nor a label")
    split = None if keys.split is None else fields.get(keys.split)
    if split in (None, ""):
        top = file.partition("/")[0]
        split = top if form.split_folders and top.lower() in SPLIT_FOLDERS else form.default_split
    data_set = None if keys.set is None else fields.get(keys.set)
    if not isinstance(data_set, str | None):
        raise Fault(f"set {short(data_set)} is not text")
    return Row(file, None, captions, label, checked_split(split), data_set or None)
