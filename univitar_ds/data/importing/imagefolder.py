"""Lists the media files of an imagefolder or videofolder of Hugging Face's datasets.

Its metadata.jsonl, metadata.csv or metadata.parquet has a `file_name` and texts for each file. It is in the folder
itself, or in each folder of a split. A path that begins with the name of a split belongs to that split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.rows import Collected, Listing, ReadOptions
from univitar_ds.data.importing.table_files import read_table
from univitar_ds.data.importing.tables import Reading, add_table
from univitar_ds.errors import DataError

_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAME = "file_name"


def recognises(source: str) -> bool:
    """Whether a source is a folder with such metadata. A metadata.jsonl with `file` has the format `folder`."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    if not (folder / _NAMES[0]).is_file():
        return bool(_metadata(folder))
    columns = read_table(folder / _NAMES[0]).columns
    return _FILE_NAME in columns and "file" not in columns


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns the rows of all metadata. Lines with a fault are left out.

    Raises: DataError if there is no metadata, or one cannot be read, lacks a column, or has no row without a fault.
    """
    folder = Path(source)
    options = replace(options, image_key=options.image_key or _FILE_NAME)
    collected = Collected(folder)
    found = _metadata(folder)
    if not found:
        raise DataError(f"neither {folder} nor a folder in it has one of {', '.join(_NAMES)}; name one that has")
    for path in found:
        reading = Reading(path.parent, path.parent, options.default_split, split_folders=True)
        add_table(collected, path, path.relative_to(folder).as_posix(), options, reading)
    return collected.listing(folder)


def _metadata(folder: Path) -> list[Path]:
    """Returns the metadata of the folder, else that of its folders, else that of their folders.

    Raises: DataError if a folder has several.
    """
    depths: list[list[Path]] = [[], [], []]
    for parent, names in folders_of(folder, {}, deepest=len(depths) - 1):
        found = [Path(parent, name) for name in names if name in _NAMES]
        if len(found) > 1:
            raise DataError(f"{parent} has {found[0].name} and other metadata; keep one of them")
        depths[len(Path(parent).relative_to(folder).parts)] += [path for path in found if path.is_file()]
    return next((sorted(found) for found in depths if found), [])
