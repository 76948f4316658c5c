"""A folder of files from many ranks that appears atomically.

    checkpoints/step-00000200/{files of the ranks, manifest.json}      complete: created only by a rename
    checkpoints/latest, checkpoints/best                               text: the name of a complete folder
    checkpoints/.tmp-*                                                 being written, or left by a crash

`manifest.json` has the size and sha256 of every other file. If a process is killed at any time, the complete folders
stay, and `latest` has the name of a complete folder. `_sweep` removes unfinished folders, which it recognizes by their
names; files that are not part of a checkpoint stay. All renames go through `atomic_write.move_into_place`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.atomic_write import move_into_place, sync
from univitar_ds.config.run_folder import CHECKPOINT_FILES
from univitar_ds.errors import CheckpointError, StorageError, writing
from univitar_ds.formats.checkpoint_dir import (
    BEST,
    LATEST,
    MANIFEST,
    complete,
    named_in,
    part_faults,
    read_manifest,
    step_of,
)
from univitar_ds.owned import clear, foreign, remove
from univitar_ds.run_lock import still_ours
from univitar_ds.training.checkpoint.protocol import (
    CHUNK_BYTES,
    Entry,
    NotAsWritten,
    Part,
    Retention,
    Target,
    manifest_of,
)

TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}({LATEST}|{BEST}|(gone-)?step-\d{{8,}})")


class LocalFolder(Target):
    """Creates `root/step-<step>`, then removes the folders that are not kept. All ranks share `root`."""

    def __init__(self, root: Path, step: int, retention: Retention) -> None:
        super().__init__()
        self._root, self._step, self._retention = root, step, retention
        self.folder = root / f"step-{step:08d}"
        self._temporary = root / f"{TEMPORARY}{self.folder.name}"

    @property
    def place(self) -> Path:
        return self.folder

    def begin(self, needed: int) -> None:
        with writing(self._root):
            still_ours(self._root.parent)
            _sweep(self._root)
            self._temporary.mkdir(parents=True)
            free = shutil.disk_usage(self._root).free
        if free < needed:
            raise StorageError(
                f"{self._root} cannot be written: {free / 1e6:,.1f} MB are free there, and the checkpoint of step "
                f"{self._step} takes {needed / 1e6:,.1f} MB; free some space there and resume; if checkpoints fill "
                f"the disk, lower checkpoint.keep ({self._retention.last})"
            )

    def put(self, part: Part) -> Entry:
        path, digest, content = self._temporary / part.name, hashlib.sha256(), memoryview(part.content)
        with writing(path):
            file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                for begin in range(0, len(content), CHUNK_BYTES):
                    self.check_wanted()
                    chunk, written = content[begin : begin + CHUNK_BYTES], 0
                    while written < len(chunk):
                        written += os.pwrite(file, chunk[written:], part.offset + begin + written)
                    digest.update(chunk)
                os.fsync(file)
            finally:
                os.close(file)
        return Entry(part.name, part.offset, len(content), digest.hexdigest())

    def check(self, entries: Sequence[Entry]) -> None:
        with writing(self._temporary, "read"):
            found = part_faults(self._temporary, entries)
        if found:
            raise NotAsWritten(
                f"{self._temporary}: {'; '.join(found)} right after writing; check the disk, and that all ranks share "
                "it"
            )

    def publish(self, entries: Sequence[Entry]) -> None:
        with writing(self.folder):
            still_ours(self._root.parent)
            _publish(self._root, self._temporary, self.folder, manifest_of(entries))
            self.published = True
            folders = {step_of(folder.name): folder for folder in complete(self._root)}
            best = folders.get(self._retention.best)
            if best is not None and named_in(self._root / BEST) != best.name:  # before the earlier best is removed
                _point(self._root, BEST, best)
            for step in self._retention.outdated(folders):
                if step != self._step:
                    _remove(folders[step])

    def clear(self) -> None:
        with suppress(Exception):  # the disk is full or gone, or another launch has the run
            still_ours(self._root.parent)
            _sweep(self._root)


def _publish(root: Path, temporary: Path, target: Path, files: dict[str, Any]) -> None:
    write_json(temporary / MANIFEST, {"version": 1, "files": files})
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link; remove it and resume")
    if target.exists() and not _remove(target):  # complete, but `latest` does not name it
        raise CheckpointError(f"{target} contains files that are not part of a checkpoint; move them and resume")
    move_into_place(temporary, target, durable=True)
    _point(root, LATEST, target)


def _point(root: Path, name: str, target: Path) -> None:
    """Writes the name of a complete folder into the file `name`."""
    pointer = root / f"{TEMPORARY}{name}"
    pointer.unlink(missing_ok=True)
    pointer.write_text(target.name + "\n", encoding="utf-8")
    move_into_place(pointer, root / name, durable=True)


def write_json(path: Path, value: Any, indent: int | None = 1) -> Path:
    """Writes `value` as JSON and syncs the file to disk. Returns `path`."""
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    sync(path)
    return path


def _remove(folder: Path) -> bool:
    """Removes a complete folder. The folder is renamed first, so that a crash leaves no partial folder under its name.

    Returns: whether the whole folder is removed. If it has files that are not part of a checkpoint, they stay under
    this name.
    """
    if folder.is_symlink():
        return False
    gone = folder.with_name(f"{TEMPORARY}gone-{folder.name}")
    if os.path.lexists(gone):  # not written by this program
        clear(folder, {re.escape(MANIFEST): None})
        return _cleared(folder)
    os.rename(folder, gone)
    return _cleared(gone)


def _sweep(root: Path) -> None:
    """Removes the files and folders with temporary names that a crash has left; all other files stay."""
    for left in root.glob(f"{TEMPORARY}*"):
        if left.is_symlink() or not re.fullmatch(_TEMPORARY_NAME, left.name):
            continue
        if not left.is_dir():
            left.unlink(missing_ok=True)
        elif not _cleared(left) and not left.name.startswith(f"{TEMPORARY}gone-"):
            raise CheckpointError(
                f"{left} contains {foreign(left, CHECKPOINT_FILES)}, which is not part of a checkpoint; move that file "
                "elsewhere"
            )


def _cleared(folder: Path) -> bool:
    """Removes the files of a checkpoint from a temporary folder, and the folder if it is then empty.

    Returns: whether the folder is removed. A `.tmp-gone-` folder that stays loses this prefix."""
    names = dict(CHECKPOINT_FILES)
    with suppress(CheckpointError):
        names |= {re.escape(name): None for name in read_manifest(folder)}  # also files of an earlier format
    clear(folder, {f"(?!{re.escape(MANIFEST)}$)({name})": None for name in names})
    if remove(folder, names):
        return True
    original = folder.with_name(folder.name.removeprefix(f"{TEMPORARY}gone-"))
    if not os.path.lexists(original):
        os.rename(folder, original)
    return False
