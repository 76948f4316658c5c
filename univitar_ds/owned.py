"""Recognises the files that the program has written, which it may replace or remove. Nothing else is ever deleted.

A folder that the program creates contains a marker file. A tree describes the entries that the program writes there:
it maps regular expressions for whole names to None for files, and to another tree for folders. Only regular files and
folders with these names are removed, one by one. Links are never followed; they belong to the user, as do all other
names.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Union

from univitar_ds.atomic_write import replace_text
from univitar_ds.errors import ConfigError, writing

MARK = ".univitar-ds"
"""Name of the marker file."""
_PROGRAM = "univitar_ds"
_PARTIAL = re.compile(r"\.(.+)\.partial", re.DOTALL)

Names = Mapping[str, Union["Names", None]]
"""A tree of the entries that the program writes."""


def mark(folder: Path, kind: str) -> None:
    """Writes the marker file of a folder that the program creates. `kind`: "run", "export" or "demo"."""
    if not is_marked(folder, kind):
        replace_text(folder / MARK, json.dumps({"program": _PROGRAM, "kind": kind}) + "\n")


def is_marked(folder: Path, kind: str) -> bool:
    """Whether the folder has a marker file of this kind."""
    try:
        if not stat.S_ISREG(os.lstat(folder / MARK).st_mode):
            return False
        content = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("program") == _PROGRAM and content.get("kind") == kind


def is_empty(folder: Path) -> bool:
    """Whether `folder` does not exist or has no entries. A broken symbolic link is not empty."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return not os.path.islink(folder)


def refuse_link(folder: Path) -> None:
    """Raises: ConfigError if `folder` is a link to a folder that is not empty, because links are not followed."""
    if folder.is_symlink() and not is_empty(folder):
        raise ConfigError(
            f"{folder} is a link to {os.path.realpath(folder)}, and nothing is replaced through a link; name the "
            "folder itself, or remove the link"
        )


def foreign(folder: Path, names: Names) -> str | None:
    """Returns the path, relative to `folder`, of the first entry that the program does not write, or None."""
    for entry in _entries(folder):
        inner = _fitting(entry, names)
        if inner is _NOTHING:
            return entry.name
        if inner is not None and (found := foreign(Path(entry.path), inner)) is not None:
            return f"{entry.name}/{found}"
    return None


def clear(folder: Path, names: Names) -> None:
    """Removes every file with one of these names below `folder`, and then every named folder that is empty."""
    for entry in _entries(folder):
        inner = _fitting(entry, names)
        if inner is _NOTHING:
            continue
        if inner is None:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)
        else:
            remove(Path(entry.path), inner)


def remove(folder: Path, names: Names) -> bool:
    """Clears the folder (`clear`) and removes it if it is empty. Returns whether it is removed; False for a link."""
    if folder.is_symlink():
        return False
    try:
        clear(folder, names)
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError:
        if is_empty(folder):
            raise
        return False
    return True


def check_result(path: Path, ours: Callable[[Path], bool]) -> None:
    """Checks that a result can be written to `path`, before the result is computed.

    Args: ours: returns whether the same command wrote an existing file, which may then be replaced.
    Raises: ConfigError if another program wrote the file, or if the file cannot be written.
    """
    parent = path.absolute().parent
    if not os.path.isdir(parent):
        raise ConfigError(f"{path} cannot be written: there is no folder {parent}; make it first")
    try:
        if os.path.lexists(path):
            path.open("ab").close()
        else:
            path.open("xb").close()
            path.unlink()
        others = path.is_file() and path.stat().st_size > 0 and not ours(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give the name of another file") from error
    if others:
        raise ConfigError(f"{path} is a file that this command has not written; give another name, or remove it")


def drawn_by(software: str) -> Callable[[Path], bool]:
    """Returns for `check_result` whether a file is a PNG that names `software` as the program that wrote it."""
    label = b"tEXtSoftware\0" + software.encode()

    def is_drawn(path: Path) -> bool:
        with path.open("rb") as file:
            return label in file.read(1024)

    return is_drawn


def write_result(path: Path, text: str) -> None:
    """Writes `text` to a path that `check_result` accepted, /dev/stdout and pipes included. Raises: StorageError."""
    if path.exists() and not path.is_file():
        with writing(path):
            path.write_text(text, encoding="utf-8")
    else:
        replace_text(path, text)


class _Nothing(dict):
    """The type of `_NOTHING`, which marks an entry that the program does not write."""


_NOTHING: Names = _Nothing()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _fitting(entry: os.DirEntry[str], names: Names) -> Names | None:
    """Returns the tree of a folder that the program writes, None for a file that it writes, else `_NOTHING`."""
    folder = entry.is_dir(follow_symlinks=False)
    if not folder and not entry.is_file(follow_symlinks=False):
        return _NOTHING
    for pattern, inner in names.items():
        if (inner is not None) == folder and re.fullmatch(pattern, entry.name):
            return inner
    partial = None if folder else _PARTIAL.fullmatch(entry.name)
    whole = (partial[1], f".{partial[1]}") if partial else ()
    if any(inner is None and re.fullmatch(pattern, name) for pattern, inner in names.items() for name in whole):
        return None
    return _NOTHING
