"""A folder of files from many ranks that appears atomically.

    checkpoints/step-00000200/{files of the ranks, manifest.json}      complete: created only by a rename
    checkpoints/latest                                                 text: the name of a complete folder
    checkpoints/.tmp-*                                                 being written, or left by a crash

`manifest.json` has the size and sha256 of every other file. If a process is killed at any time, the complete folders
stay, and `latest` has the name of a complete folder. `_sweep` removes unfinished folders, which it recognizes by their
names; files that no checkpoint writes stay. New folders and `latest` get their names by `atomic_write.move_into_place`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from univitar_ds.atomic_write import move_into_place, sync
from univitar_ds.config.run_folder import CHECKPOINT_FILES
from univitar_ds.errors import CheckpointError, writing
from univitar_ds.formats.checkpoint_dir import LATEST, MANIFEST, complete, faults, read_manifest, sha256
from univitar_ds.owned import clear, foreign, remove
from univitar_ds.run_lock import still_ours
from univitar_ds.training.distributed.process_group import (
    World,
    all_ranks_or_none,
    gather_json_to_main,
    scatter_json,
)

TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}({LATEST}|(gone-)?step-\d{{8,}})")


class Merge(NamedTuple):
    """What rank 0 writes once all ranks have written."""

    share: Callable[[], Any]
    """Called after this rank has written. Returns what rank 0 needs of it, as JSON."""
    write: Callable[[Path, list[Any]], Iterable[Path]]
    """Called on rank 0 with the folder and the shares of all ranks, by rank. Returns further files."""


NO_MERGE = Merge(lambda: None, lambda folder, shares: ())


def commit(
    root: Path,
    step: int,
    write: Callable[[Path], Iterable[Path]],
    world: World,
    keep: int,
    merge: Merge = NO_MERGE,
) -> Path:
    """Creates `root/step-<step>` from the files that each rank writes, then removes all but the newest `keep` folders.

    All ranks call it. `write` is called with a folder that all ranks share, and returns the files of this rank.
    Sizes and hashes of files, and the shares for `merge`, are sent to rank 0 alone.

    Raises: the rank's own error, or PeerFailure on other ranks, if a rank fails, for example on a full disk. If it
        fails before the new folder gets its name, the complete folders of other steps are unchanged.
    """
    target = root / f"step-{step:08d}"
    temporary = root / f"{TEMPORARY}{target.name}"
    with all_ranks_or_none(world), writing(root):
        if world.is_main:
            still_ours(root.parent)
            _sweep(root)
            temporary.mkdir(parents=True)
    try:
        by_rank = _written(temporary, write, world, merge)
        with all_ranks_or_none(world), writing(target):
            if world.is_main:
                still_ours(root.parent)
                _publish(root, temporary, target, {k: v for entries in by_rank for k, v in entries.items()}, keep)
        return target
    except Exception:
        if world.is_main:
            with suppress(Exception):  # the disk is full or gone, or another launch has the run
                still_ours(root.parent)
                _sweep(root)
        raise


def _written(
    temporary: Path, write: Callable[[Path], Iterable[Path]], world: World, merge: Merge
) -> list[dict[str, Any]]:
    """Writes and verifies all files. Returns their entries in the manifest by rank on rank 0, [] on other ranks."""
    entries: dict[str, dict[str, Any]] = {}
    with all_ranks_or_none(world), writing(temporary):
        for path in write(temporary):
            sync(path)
            entries[path.name] = _entry(path)
        share = merge.share()
    gathered = gather_json_to_main([entries, share], world) or []
    by_rank = [entries for entries, _ in gathered]
    with all_ranks_or_none(world), writing(temporary):
        if world.is_main:
            for path in merge.write(temporary, [share for _, share in gathered]):
                sync(path)
                by_rank[0][path.name] = _entry(path)
    # Each rank reads its neighbour's files, which verifies the content and that all ranks share one disk.
    neighbours = scatter_json([*by_rank[1:], *by_rank[:1]] if world.is_main else None, world)
    with all_ranks_or_none(world):
        found = faults(temporary, neighbours)
        if found:
            raise CheckpointError(
                f"{temporary}: {'; '.join(found)} right after writing; check the disk, and that all ranks share it"
            )
    return by_rank


def _publish(root: Path, temporary: Path, target: Path, entries: dict[str, Any], keep: int) -> None:
    write_json(temporary / MANIFEST, {"version": 1, "files": entries})
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link; remove it and resume")
    if target.exists() and not _remove(target):  # complete, but not in `latest`
        raise CheckpointError(f"{target} contains files that are not part of a checkpoint; move them and resume")
    move_into_place(temporary, target, durable=True)
    pointer = root / f"{TEMPORARY}{LATEST}"
    pointer.unlink(missing_ok=True)
    pointer.write_text(target.name + "\n", encoding="utf-8")
    move_into_place(pointer, root / LATEST, durable=True)
    for old in complete(root)[:-keep]:
        if old != target:
            _remove(old)


def write_json(path: Path, value: Any, indent: int | None = 1) -> Path:
    """Writes `value` as JSON to the disk. Returns `path`."""
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    sync(path)
    return path


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _remove(folder: Path) -> bool:
    """Removes a complete folder. The folder is renamed first, so that a crash leaves no partial folder under its name.

    Returns: whether the whole folder is removed. Files that no checkpoint writes stay, under the folder's name.
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
    """Clears a temporary folder. Returns whether it is removed; a `.tmp-gone-` folder that stays loses this prefix."""
    names = dict(CHECKPOINT_FILES)
    with suppress(CheckpointError):
        names |= {re.escape(name): None for name in read_manifest(folder)}  # also those of an earlier format
    clear(folder, {f"(?!{re.escape(MANIFEST)}$)({name})": None for name in names})
    if remove(folder, names):
        return True
    original = folder.with_name(folder.name.removeprefix(f"{TEMPORARY}gone-"))
    if not os.path.lexists(original):
        os.rename(folder, original)
    return False
