"""The folder that a conversion writes: it appears when it is complete, and replaces only what a conversion wrote."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import move_into_place, replace_text
from univitar_ds.config.run_folder import CHECKPOINTS, EXPORT, EXPORT_FILES
from univitar_ds.config.run_folder import CONFIG as RUN_CONFIG
from univitar_ds.convert import program
from univitar_ds.errors import CheckpointError, StorageError, UserError, writing
from univitar_ds.formats.recognise import FORMATS, module_of
from univitar_ds.owned import MARK, Names, clear, foreign, is_empty, is_marked, mark, remove

KIND = "export"
"""Kind of the marker file in a folder that a conversion wrote. A folder without the file is not replaced."""
_LIST = ".univitar-ds-files"
"""A file with the paths of all files that a conversion wrote into its folder."""
_OWN = (f"{re.escape(MARK)}(-files)?", re.escape(MARK), re.escape(_LIST))
"""Patterns of the names of the marker file and of the list, as they are in EXPORT_FILES and in lists."""


@contextmanager
def new_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yields a new folder for the body to write, which gets the name `out` after the body.

    If the body fails or the process is killed, `out` is unchanged, and the next conversion to `out` removes incomplete
    files. An earlier result is first renamed, since the system cannot rename a folder over one that is not empty, and
    removed at the end. If the process is killed between, the next conversion renames the earlier result back.

    Args: replace: whether a folder that a conversion wrote may be replaced.
    Raises: CheckpointError if `out` contains anything else, or another process writes it now; StorageError if it cannot
        be written.
    """
    partial, earlier = (out.with_name(f".{out.name}.{word}") for word in ("partial", "earlier"))
    with writing(out), _locked(partial, out):
        for folder in (out, partial, earlier):
            _refuse(folder, replace=replace or folder is not out, own=_is_export_of_run(out))
        if is_empty(out) and not is_empty(earlier):
            move_into_place(earlier, out)
            _refuse(out, replace=replace, own=_is_export_of_run(out))
        _remove(partial)
        partial.mkdir(parents=True)
        with _locked(partial, out):
            try:
                mark(partial, KIND)
                yield partial
                _record(partial)
                _remove(earlier)
                if not is_empty(out):
                    os.rename(out, earlier)
                move_into_place(partial, out)
                _remove(earlier)
            except BaseException:
                with suppress(OSError, UserError):
                    _remove(partial)
                raise


def check_space(out: Path, nbytes: int) -> None:
    """Checks that the disk of `out` has at least `nbytes` of free space. Raises: StorageError."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StorageError(
            f"{out} needs {nbytes / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; free some space there, or "
            "name another place"
        )


def _is_export_of_run(out: Path) -> bool:
    """Returns whether `out` is the export in a run's folder; exports of earlier versions have no marker file."""
    run = out.parent
    return out.name == EXPORT and (run / RUN_CONFIG).is_file() and (run / CHECKPOINTS).is_dir()


def _refuse(out: Path, *, replace: bool, own: bool) -> None:
    if out.is_symlink():
        raise CheckpointError(f"{out} is a link, and nothing is replaced through a link; name the folder itself")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder")
    if is_empty(out) or _only_begun(out):
        return
    other = foreign(out, _names(out))
    if other is not None:
        raise CheckpointError(f"{out} holds {other}, which no conversion wrote; name another folder or empty it")
    if not own and not is_marked(out, KIND):
        raise CheckpointError(
            f"{out} holds a model without the marker file of a conversion ({MARK}), so it may be another's; name "
            "another folder, or remove this one"
        )
    if not replace:
        raise CheckpointError(f"{out} holds an earlier result; add --force to replace it, or name another folder")


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Holds a lock on `folder`, if it exists, which the system releases when the process ends.

    Raises: CheckpointError if another process holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it does not exist, or is rejected later
        descriptor = None
    try:
        try:
            if descriptor is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process writes {out} now; wait for it, or name another folder") from error
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _only_begun(folder: Path) -> bool:
    """Returns whether a process was killed before it had written the marker file of the folder."""
    return folder.is_dir() and os.listdir(folder) == [f"{MARK}.partial"] and not (folder / f"{MARK}.partial").is_dir()


def _remove(folder: Path) -> None:
    """Removes what a conversion wrote. Marker file and list are removed last, so that an interrupted removal can be
    continued."""
    names = _names(folder)
    if not is_empty(folder) and not folder.is_symlink():
        clear(folder, {name: inner for name, inner in names.items() if name not in _OWN})
    remove(folder, names)


def _record(folder: Path) -> None:
    """Writes the list of files, so that a later conversion can replace exactly these."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != _LIST)
    replace_text(folder / _LIST, json.dumps(files, indent=1) + "\n")


def _names(folder: Path) -> Names:
    """Returns the tree of entries that a conversion may have written to `folder`: by names, and by its list.

    The folder of a conversion that was killed has no list. If it has the marker file, the names of all formats count as
    written by the conversion."""
    tree: dict[str, Any] = copy.deepcopy({**EXPORT_FILES, re.escape(_LIST): None})
    listed = folder / _LIST
    if not is_marked(folder, KIND):
        return tree
    if not os.path.lexists(listed):
        for names in (program.FILES, *(getattr(module_of(name), "FILES", {}) for name in FORMATS)):
            tree |= names
        return tree
    try:
        files = json.loads(listed.read_bytes()) if not listed.is_symlink() else []
    except (OSError, ValueError, RecursionError):
        return tree
    for name in files if isinstance(files, list) else []:
        *folders, last = str(name).split("/")
        inside = tree
        for part in folders:
            inside = inside.setdefault(re.escape(part), {})
            if inside is None:
                break
        else:
            inside.setdefault(re.escape(last), None)
    return tree
