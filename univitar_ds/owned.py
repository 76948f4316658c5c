"""Files that the program itself has written and may replace or remove; nothing else is ever deleted.

A folder that the program makes contains a small file as a mark. What it writes there is described by a tree: patterns
of whole names, each with None for a file or another tree for a folder. Only regular files and folders of those names
are removed, one by one; a link is never followed and, like any other name, belongs to the user.
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
_PROGRAM = "univitar_ds"
_PARTIAL = re.compile(r"\.(.+)\.partial", re.DOTALL)

Names = Mapping[str, Union["Names", None]]


def mark(folder: Path, kind: str) -> None:
    """Mark this folder as made by the program: `kind` is "run", "export" or "demo"."""
    if not is_marked(folder, kind):
        replace_text(folder / MARK, json.dumps({"program": _PROGRAM, "kind": kind}) + "\n")


def is_marked(folder: Path, kind: str) -> bool:
    """Whether the folder has the mark of this kind."""
    try:
        if not stat.S_ISREG(os.lstat(folder / MARK).st_mode):
            return False
        content = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("program") == _PROGRAM and content.get("kind") == kind


def is_empty(folder: Path) -> bool:
    """Whether nothing has this name, or it is a folder without entries."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return not os.path.islink(folder)


def refuse_link(folder: Path) -> None:
    """Raises: ConfigError for a link to a folder that is not empty, which must not be cleared through the link."""
    if folder.is_symlink() and not is_empty(folder):
        raise ConfigError(
            f"{folder} is a link to {os.path.realpath(folder)}, and nothing is replaced through a link; name the "
            "folder itself, or remove the link"
        )


def foreign(folder: Path, names: Names) -> str | None:
    """The first entry, as a path below `folder`, that the program does not write; None if there is none."""
    for entry in _entries(folder):
        inner = _fitting(entry, names)
        if inner is _NOTHING:
            return entry.name
        if inner is not None and (found := foreign(Path(entry.path), inner)) is not None:
            return f"{entry.name}/{found}"
    return None


def clear(folder: Path, names: Names) -> None:
    """Remove every file of these names below `folder`, and then the empty folders among them."""
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
    """`clear` the folder and remove it if nothing is left; returns whether it is gone. A link is not followed."""
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
    """Checks a file that the user named for a result, before the work is done.

    Args: ours: whether an existing file was written by the same command, and may be replaced.
    Raises: ConfigError for a file that was not, or that cannot be written.
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


def write_result(path: Path, text: str) -> None:
    """Writes a file that `check_result` has allowed; /dev/stdout or a pipe is not replaced. Raises: StorageError."""
    if path.exists() and not path.is_file():
        with writing(path):
            path.write_text(text, encoding="utf-8")
    else:
        replace_text(path, text)


class _Nothing(dict):
    """The entry of a name that the program does not write."""


_NOTHING: Names = _Nothing()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _fitting(entry: os.DirEntry[str], names: Names) -> Names | None:
    """The tree of a folder that the program writes, None for such a file, else `_NOTHING`."""
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
