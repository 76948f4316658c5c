"""Lists the media files of class folders: `train/cat/a.jpg`, or `cat/a.jpg` without splits. They have only labels.

The labels are the names of the folders, or class names that a file such as ImageNet's LOC_synset_mapping.txt gives.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.rows import (
    SPLIT_FOLDERS,
    Collected,
    Listing,
    ReadOptions,
    Row,
    first_left_out,
    is_media,
)
from univitar_ds.data.shards.captions import decoded
from univitar_ds.data.shards.class_names import read_class_names, shared_names
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import DataError, SampleError

_log = logging.getLogger(__name__)
_MAX_BYTES = 16 << 20
_PAIR = re.compile(r"(\S+?)[\t ,;:]+(\S.*)")
_FORM = "give lines of a folder name, a tab and a class name, or a JSON object that maps one to the other"


def recognises(source: str) -> bool:
    """Whether a source is a folder whose media files are all in at least two class folders."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    files = list(_files(folder, {}))
    splits = _has_splits(files)
    return all(_class_of(file, splits) for file in files) and len({_class_of(file, splits) for file in files}) > 1


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns a row for each media file. A file outside of class folders is left out.

    Raises: DataError if there is no row, or if the file of class names lacks a folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give one with a folder for each class")
    collected = Collected(folder)
    files = list(_files(folder, collected.left_out))
    splits = _has_splits(files)
    found = {_class_of(file, splits) for file in files} - {None}
    names = _names(options.class_names, sorted(filter(None, found)))
    for file in files:
        name = _class_of(file, splits)
        if name is None:
            collected.left_out[str(file)] = "no_class: it is in no class folder; move it into one"
            continue
        split = file.parts[0].lower() if splits else options.default_split
        collected.add(Row(str(file), None, (), names[name], split), str(file))
    if not collected.left_out and not files:
        raise DataError(f"{folder} holds no image or video; give a folder with a folder for each class")
    if not found:
        raise DataError(f"{folder} has no class folder with media{first_left_out(collected.left_out)}")
    return collected.listing(folder)


def _files(folder: Path, left_out: dict[str, str]) -> Iterator[PurePosixPath]:
    for parent, names in folders_of(folder, left_out):
        inside = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        yield from (inside / name for name in names if is_media(name))


def _has_splits(files: list[PurePosixPath]) -> bool:
    """Whether all folders with media are splits, because a class may also be called `test`."""
    tops = {file.parts[0] for file in files if len(file.parts) > 1}
    return bool(tops) and all(top.lower() in SPLIT_FOLDERS for top in tops)


def _class_of(file: PurePosixPath, splits: bool) -> str | None:
    place = int(splits)
    return file.parts[place] if len(file.parts) > place + 1 else None


def _names(path: Path | None, folders: list[str]) -> dict[str, str]:
    """Returns the label of each class folder. Raises: DataError if the file of names lacks one."""
    if path is None:
        return {name: name for name in folders}
    if all(name.isascii() and name.isdigit() and len(name) < 10 for name in folders):
        listed = read_class_names(str(path), LOCAL)
        given = {name: listed[int(name)] for name in folders if int(name) < len(listed)}
    else:
        given = _read_names(path)
    if missing := [name for name in folders if name not in given]:
        raise DataError(
            f"{path}: has no name for {len(missing)} of {len(folders)} class folders, such as {missing[0]!r}; it names "
            f"{', '.join(map(repr, list(given)[:3])) or 'none'}: {_FORM}"
        )
    if shared := shared_names([given[name] for name in folders]):
        _log.warning("%s: %s", path, shared)
    return given


def _read_names(path: Path) -> dict[str, str]:
    try:
        text = decoded(read_file(path, _MAX_BYTES, f" (limit {_MAX_BYTES})"))
    except (SampleError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); {_FORM}") from error
    if text.lstrip().startswith("{"):
        return _of_json(path, text)
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        folder, tab, name = line.strip().partition("\t")
        if not tab:
            pair = _PAIR.fullmatch(line.strip())
            if pair is None:
                raise DataError(f"{path}: line {number} is {line[:60]!r}, not a folder and its name; {_FORM}")
            folder, name = pair.groups()
        if found.setdefault(folder.strip(), name.strip()) != name.strip():
            raise DataError(f"{path}: line {number} names folder {folder!r} again; give each folder one name")
    return found


def _of_json(path: Path, text: str) -> dict[str, str]:
    """Returns the names in {folder: name}, or in {"0": [folder, name]}, the form of ImageNet's names in Keras."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); {_FORM}") from error
    pairs = [tuple(value) if isinstance(value, list) else (key, value) for key, value in document.items()]
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(one, str) and one.strip() for one in pair):
            raise DataError(f"{path}: has {str(pair)[:60]}, not a folder and its name; {_FORM}")
    return dict(pairs)
