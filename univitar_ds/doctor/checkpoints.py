"""Checks the folder of checkpoints: whether each node can write there, how fast, whether all see it, and free space."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, Answers, Found, Row, from_error, ranks_named
from univitar_ds.doctor.storage import rate_rows
from univitar_ds.errors import StorageError, writing
from univitar_ds.planning.checks import existing_parent
from univitar_ds.planning.sizes import amount

NAME, SHARED = "checkpoint folder", "shared folder"
MOST_BYTES, PIECE = 64 << 20, 4 << 20
MOST_S = 5.0


def write_rate(folder: Path) -> tuple[int, float]:
    """Writes an unnamed temporary file, which the system removes even if this process is killed.

    Returns: the number of bytes, and the seconds until they are on the disk. Raises: StorageError if `folder` cannot be
    written.
    """
    content = os.urandom(PIECE)  # random, since a disk may compress
    total = 0
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        start = time.monotonic()
        while total < MOST_BYTES and time.monotonic() - start < MOST_S:
            total += file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return total, time.monotonic() - start


def space(folder: Path, checkpoint_bytes: float | None, count: int) -> Row:
    """Returns a row about the free space for `count` checkpoints, including the one that is being written.

    Args: checkpoint_bytes: size of one, None if unknown: then only the free space is reported.
    """
    free = shutil.disk_usage(folder).free
    if checkpoint_bytes is None:
        return Row(NAME, OK, f"{amount(free)} are free in {folder}")
    needed = checkpoint_bytes * count
    text = f"{count} checkpoints need {amount(needed)}, {amount(free)} are free in {folder}"
    if free < needed:
        remedy = "free some space there, name another output=..., lower checkpoint.keep or raise keep_every_steps"
        return Row(NAME, FAILED, text, remedy, numbers={"free_bytes": free, "needed_bytes": needed})
    return Row(NAME, OK, text, numbers={"free_bytes": free, "needed_bytes": needed})


def in_store(place: str, settings: StorageSettings) -> Row:
    """Returns a row about checkpoints at an s3:// address. Raises: DataError if the store cannot be reached with the
    credentials of this node."""
    storage_for(place, settings).exists(place)
    return Row(NAME, OK, f"the store at {place} accepts these credentials; this check writes nothing there")


def _check(context: Context) -> Found:
    if context.folder is None:
        return Found()
    folder = existing_parent(context.folder)
    if not folder.is_dir():
        return Found([Row(NAME, FAILED, f"{folder} is not a folder", "name another output=... or name=...")])
    try:
        size, seconds = write_rate(folder)
    except StorageError as error:
        return Found(from_error(NAME, error))
    rows = []
    checkpoint = None if context.config is None else context.config.checkpoint
    if checkpoint is not None and checkpoint.folder is not None:
        rows.append(in_store(checkpoint.folder, StorageSettings.of(context.config.data)))
    elif context.ranks.is_main:  # once: free space changes all the time, so the rows of nodes would differ
        count = context.checkpoints or (2 if checkpoint is None else checkpoint.keep + 1)
        rows.append(space(folder, context.checkpoint_bytes, count))
    return Found(rows, {"mb_s": size / 1e6 / max(seconds, 1e-6), "mb": size / 1e6})


def _check_shared(context: Context) -> Found:
    """Checks whether this node sees a file that rank 0 creates in the run's folder or its nearest existing parent."""
    ranks = context.ranks
    if len(ranks.firsts()) == 1:
        return Found()
    place = _make(context) if ranks.is_main else None
    try:
        place = ranks.at_main(lambda: place, "shared place")
        seen = None if place is None else Path(place).is_file()
        ranks.store.add("shared seen", 1)
        if ranks.is_main:
            _wait_for_others(context)
    finally:
        context.remove_files()
    return Found(values={} if seen is None else {"seen": seen, "place": str(Path(place).parent)})


def _make(context: Context) -> str | None:
    """Creates the file that all nodes should see. Returns its path; None without a run or if it cannot be created."""
    if context.folder is None:
        return None
    path = existing_parent(context.folder) / f".univitar-ds-doctor-{uuid.uuid4().hex}"
    try:
        context.made.append(path)
        path.touch(exist_ok=False)
    except OSError:  # CHECK reports it
        context.made.remove(path)
        return None
    return str(path)


def _wait_for_others(context: Context) -> None:
    """Waits until one rank of each node has checked. `run.check_all` reports ranks that do not answer."""
    ranks = context.ranks
    deadline = time.monotonic() + ranks.limit_s / 2
    while ranks.store.add("shared seen", 0) < len(ranks.firsts()) and time.monotonic() < deadline:
        time.sleep(0.02)


def compare(answers: Answers) -> list[Row]:
    """Returns a row with the rates at which the nodes write to the folder."""
    return rate_rows(NAME, "writes", answers)


def compare_shared(answers: Answers) -> list[Row]:
    """Returns a row about the nodes that see the file of rank 0, failed with those that do not."""
    seen = answers.of("seen")
    if not seen:
        return []
    place = answers.values[min(seen)]["place"]
    blind = sorted(rank for rank, value in seen.items() if not value)
    if not blind:
        return [Row(SHARED, OK, f"{len(seen)} nodes see the file that rank 0 made in {place}")]
    verb = "does" if len(blind) == 1 else "do"
    text = f"{ranks_named(blind, answers.nodes)} {verb} not see the file that rank 0 made in {place}"
    return [Row(SHARED, FAILED, text, "mount one file system there on all nodes, or name another output=...")]


CHECK = Check(NAME, _check, "the disk with the run's folder does not answer on this node", compare=compare)
SHARED_CHECK = Check(
    SHARED, _check_shared, "the disk with the run's folder does not answer", together=True, compare=compare_shared
)
