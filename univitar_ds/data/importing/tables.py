"""Lists the media files that a table names or holds, with captions and labels from its columns.

Relative paths start in the folder of the table, or in the folder `images`. All paths, also absolute ones, must be
inside this folder. Several rows of one file are joined, as in tables with one caption per row. A column of a Parquet
table may hold the files themselves, as the `datasets` library writes them. A folder may have a data set in several
Parquet tables, with its splits in their names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.records import Embedded, Table, Unreadable
from univitar_ds.data.importing.rows import (
    SPLIT_FOLDERS,
    Cell,
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
    table_stamp,
)
from univitar_ds.data.importing.table_files import EXTENSIONS, read_table
from univitar_ds.errors import DataError

_IMAGE_KEYS = (
    *("file_name", "file", "filename", "filepath", "file_path", "image_path", "video_path", "path"),
    *("image", "img", "video"),
)
_CAPTION_KEYS = ("captions", "caption", "text", "title")
_LABEL_KEYS = ("label", "class")
_SPLIT_KEY, _SET_KEY = "split", "set"
_PART = re.compile(r"(?:.*-)?([A-Za-z0-9_]+)-\d+-of-\d+")
"""The name of a part of a data set, `train-00000-of-00002`, with its split."""
_TEXT_TABLES = (".csv", ".tsv", ".jsonl")
_NAME_LENGTH = 100
"""Number of characters that are kept of the name of a file in a table."""


class Keys(NamedTuple):
    """Columns of a table: of paths or media, captions, label, split and set. The last three are None if there is no
    column. `class_names`: names of the labels that are numbers, None if labels are names themselves."""

    image: str
    captions: tuple[str, ...]
    label: str | None
    split: str | None
    set: str | None
    class_names: Sequence[str] | None = None


class Reading(NamedTuple):
    """Settings for turning the records of a table into rows.

    `start`: folder of relative paths; `above`: folder of those that begin with `..`; `default_split`: split of records
    that name none; `split_folders`: whether a first folder with the name of a split is one; `table` and `stamp`: the
    path of a table whose records may have `Embedded` media, and its `table_stamp` before they are read.
    """

    start: Path
    above: Path
    default_split: str
    split_folders: bool = False
    table: Path | None = None
    stamp: tuple[int, int] = (0, 0)


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
    add_table(collected, path, path.name, options, Reading(root, path.parent, options.default_split), form)
    return collected.listing(path)


def files_named(source: str, options: ReadOptions, form: str | None = None) -> set[str]:
    """Returns the paths in the rows of a table, as they are written. Raises: DataError as `rows`."""
    table = read_table(Path(source), form)
    key = keys_of(Path(source), table, options).image
    values = (record.fields.get(key) for record in table.records if isinstance(record.fields, dict))
    return {value for value in values if isinstance(value, str) and value}


def recognises_parts(source: str) -> bool:
    """Whether a source is a folder with Parquet tables."""
    return Path(source).is_dir() and any(_parts(Path(source), {}))


def rows_of_parts(source: str, options: ReadOptions) -> Listing:
    """Returns the rows of all Parquet tables in a folder and its folders, in the order of their names.

    Raises: DataError as `rows`, or if there is no table.
    """
    folder = Path(source)
    left_out: dict[str, str] = {}
    parts = list(_parts(folder, left_out)) if folder.is_dir() else []
    if not parts:
        raise DataError(f"{folder} has no Parquet table (*.parquet); name the folder that has")
    root = folder if options.images is None else options.images
    if not root.is_dir():
        raise DataError(f"--images {root}: is not a folder; name the folder in which the paths of the tables start")
    collected = Collected(root, left_out)
    for path in parts:
        name = path.relative_to(folder).as_posix()
        start = path.parent if options.images is None else root
        reading = Reading(start, path.parent, split_of_part(name) or options.default_split)
        add_table(collected, path, name, options, reading)
    return collected.listing(folder)


def split_of_part(name: str) -> str | None:
    """Returns the split in the relative path of a table, as `datasets` names them; None if it has none.

    Examples: `data/train-00000-of-00002.parquet`, `validation.parquet`, `test_0.parquet`, `default/train/0000.parquet`.
    """
    path = PurePosixPath(name)
    if part := _PART.fullmatch(path.stem):
        return part[1]
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_FOLDERS]
    return next((word for word in (*words, *map(str.lower, reversed(path.parts[:-1]))) if word in SPLIT_FOLDERS), None)


def _parts(folder: Path, left_out: dict[str, str]) -> list[Path]:
    return sorted(
        Path(parent, name)
        for parent, names in folders_of(folder, left_out)
        for name in names
        if Path(name).suffix.lower() == ".parquet"
    )


def add_table(
    collected: Collected, path: Path, name: str, options: ReadOptions, reading: Reading, form: str | None = None
) -> None:
    """Adds a row for each record of a table, or of media in it. `name`: name of the table in messages."""
    reading = reading._replace(table=path, stamp=table_stamp(path))
    table = read_table(path, form)
    add_records(collected, name, table, keys_of(path, table, options), reading)


def recognises_one(source: str) -> bool:
    """Whether a source is a folder with exactly one table of texts, such as `captions.csv` beside the images."""
    return _one_table(Path(source)) is not None


def rows_of_one(source: str, options: ReadOptions) -> Listing:
    """Returns the rows of the only table in a folder. Raises: DataError as `rows`, or if there is not exactly one."""
    path = _one_table(Path(source))
    if path is None:
        raise DataError(f"{source} has not exactly one of *{', *'.join(_TEXT_TABLES)}; name the table to read")
    return rows(str(path), options)


def _one_table(folder: Path) -> Path | None:
    found = [path for path in folder.iterdir() if path.suffix.lower() in _TEXT_TABLES] if folder.is_dir() else []
    return found[0] if len(found) == 1 and found[0].is_file() else None


def keys_of(path: Path, table: Table, options: ReadOptions) -> Keys:
    """Returns the columns to read. Raises: DataError that lists the columns if one is missing."""
    columns = table.columns
    there = f"{path} has the columns {', '.join(columns)}" if columns else f"{path} has no row"
    asked = {"--image-key": options.image_key, "--label-key": options.label_key, "--split-key": options.split_key}
    wanted = [(name, key) for name, key in asked.items() if key is not None]
    wanted += [("--caption-key", key) for key in options.caption_keys]
    for name, key in wanted:
        if key not in columns:
            raise DataError(f"{name} {key!r}: there is no such column; {there}")
    image = options.image_key or _image_column(table)
    captions = options.caption_keys or tuple(filter(None, [_first(_CAPTION_KEYS, columns)]))
    label = options.label_key or _first(_LABEL_KEYS, columns)
    if label is None and not captions and len(table.class_names) == 1:
        label = next(iter(table.class_names))
    if image is None:
        several = f"; {' and '.join(table.files)} hold files" if table.files else ""
        raise DataError(f"{there}{several}; name the one with images or videos, or their paths: --image-key NAME")
    if not captions and label is None:
        raise DataError(f"{there}; name the one with captions or labels: --caption-key NAME or --label-key NAME")
    split = options.split_key or _first([_SPLIT_KEY], columns)
    return Keys(image, captions, label, split, _first([_SET_KEY], columns), table.class_names.get(label or ""))


def _image_column(table: Table) -> str | None:
    """Returns the column of media or of their paths; None if there is none, or several may be."""
    if table.files:
        return _first(_IMAGE_KEYS, table.files) or (table.files[0] if len(table.files) == 1 else None)
    named = _first(_IMAGE_KEYS, table.columns)
    return named or (table.binary[0] if len(table.binary) == 1 else None)


def _first(names: Iterable[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def add_records(collected: Collected, name: str, table: Table, keys: Keys, form: Reading) -> None:
    """Adds a row for each record of a table. `name`: name of the table in messages."""
    for record in table.records:
        where = f"{name}, {record.place}"
        try:
            if isinstance(record.fields, str):
                raise Fault(record.fields)
            collected.add(_row(collected.root, name, record.fields, keys, form), where)
        except Fault as fault:
            collected.left_out[where] = str(fault)


def _row(root: Path, name: str, fields: dict[str, Any], keys: Keys, form: Reading) -> Row:
    value = fields.get(keys.image)
    if value is None or value == "":
        raise Fault(f"no file in {keys.image}; it has {', '.join(map(str, list(fields)[:20])) or 'no field'}")
    if isinstance(value, Unreadable):
        raise Fault(f"column {keys.image} {value.reason}")
    if isinstance(value, bytes | dict):
        raise Fault(f"column {keys.image} holds the media itself, not paths; export it to files or WebDataset tars")
    part = None
    if isinstance(value, Embedded):
        assert form.table is not None
        part = Cell(str(form.table.absolute()), keys.image, value.row, form.stamp, str(form.start))
        file = _name_of(name, value)
    else:
        file = file_inside(root, value, form.start, form.above)
    captions = tuple(dict.fromkeys(text for key in keys.captions for text in captions_of(fields.get(key))))
    label = None if keys.label is None else _label(fields.get(keys.label), keys)
    if not captions and label is None:
        raise Fault("no_caption: it has neither a caption nor a label")
    split = None if keys.split is None else fields.get(keys.split)
    if split in (None, ""):
        top = file.partition("/")[0]
        split = top if form.split_folders and top.lower() in SPLIT_FOLDERS else form.default_split
    data_set = None if keys.set is None else fields.get(keys.set)
    if not isinstance(data_set, str | None):
        raise Fault(f"set {short(data_set)} is not text")
    return Row(file, None, captions, label, checked_split(split), data_set or None, part)


def _name_of(table: str, media: Embedded) -> str:
    """Returns the name of media in a table: its path, the row, and the last part of the file's own name."""
    own = re.split(r"[/\\]", media.name.replace("\0", ""))[-1][-_NAME_LENGTH:]
    return f"{table}/{media.row}" + (f"/{own}" if own.strip(".") else "")


def _label(value: Any, keys: Keys) -> str | None:
    """Returns the label of a record, by its name if it is the number of a class. Raises: Fault."""
    if isinstance(value, float) and value.is_integer():  # as pandas writes numbers beside missing ones
        value = int(value)
    if keys.class_names is None or isinstance(value, bool) or not isinstance(value, int):
        return label_of(value)
    if value == -1:  # `datasets` writes it where the class is unknown
        return None
    if not 0 <= value < len(keys.class_names):
        raise Fault(f"label {value} has no name; the table names {len(keys.class_names)} classes")
    return keys.class_names[value]
