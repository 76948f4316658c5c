"""The folder of checkpoints: whether each node can write there, how fast, whether nodes share it, and free space."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.doctor.findings import FAILED, OK, Answers, Found, Row, from_error, ranks_named
from univitar_ds.doctor.scene import Check, Scene
from univitar_ds.doctor.storage import rate_rows
from univitar_ds.errors import StorageError, writing
from univitar_ds.planning.checks import existing_parent
from univitar_ds.planning.sizes import amount

NAME, SHARED = "checkpoint folder", "shared folder"
MOST_BYTES, PIECE = 64 << 20, 4 << 20
MOST_S = 5.0


def write_rate(folder: Path) -> tuple[int, float]:
    """Writes a temporary file without a name, which the system removes even if this process is killed.

    Returns: the bytes, and the seconds until they are on the disk. Raises: StorageError.
    """
    content = os.urandom(PIECE)  # a disk may compress
    total = 0
    with writing(folder), tempfile.TemporaryFile(dir=folder) as file:
        start = time.monotonic()
        while total < MOST_BYTES and time.monotonic() - start < MOST_S:
            total += file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return total, time.monotonic() - start


def space(folder: Path, checkpoint_bytes: float | None, count: int) -> Row:
    """Returns a row about the space for `count` checkpoints, the one that is being written among them."""
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
    """Returns a row about checkpoints at an s3:// address. Raises: DataError if the store refuses the credentials."""
    storage_for(place, settings).exists(place)
    return Row(NAME, OK, f"the store at {place} accepts these credentials; this check writes nothing there")


def _look(scene: Scene) -> Found:
    if scene.folder is None:
        return Found()
    folder = existing_parent(scene.folder)
    if not folder.is_dir():
        return Found([Row(NAME, FAILED, f"{folder} is no folder", "name another output=... or name=...")])
    try:
        size, seconds = write_rate(folder)
    except StorageError as error:
        return Found(from_error(NAME, error))
    rows = []
    checkpoint = None if scene.config is None else scene.config.checkpoint
    if checkpoint is not None and checkpoint.folder is not None:
        rows.append(in_store(checkpoint.folder, StorageSettings.of(scene.config.data)))
    elif scene.ranks.is_main:  # free space changes all the time, so each node would have a row of its own
        count = scene.checkpoints or (2 if checkpoint is None else checkpoint.keep + 1)
        rows.append(space(folder, scene.checkpoint_bytes, count))
    return Found(rows, {"mb_s": size / 1e6 / max(seconds, 1e-6), "mb": size / 1e6})


def _look_shared(scene: Scene) -> Found:
    """Looks for a file that rank 0 has created in the run's folder, or in its nearest parent that exists."""
    ranks = scene.ranks
    if len(ranks.firsts()) == 1:
        return Found()
    place = _make(scene) if ranks.is_main else None
    try:
        place = ranks.at_main(lambda: place, "shared place")
        seen = None if place is None else Path(place).is_file()
        ranks.store.add("shared seen", 1)
        if ranks.is_main:
            _wait_for_others(scene)
    finally:
        scene.forget_files()
    return Found(values={} if seen is None else {"seen": seen, "place": str(Path(place).parent)})


def _make(scene: Scene) -> str | None:
    if scene.folder is None:
        return None
    path = existing_parent(scene.folder) / f".univitar-ds-doctor-{uuid.uuid4().hex}"
    try:
        scene.made.append(path)
        path.touch(exist_ok=False)
    except OSError:  # CHECK reports it
        scene.made.remove(path)
        return None
    return str(path)


def _wait_for_others(scene: Scene) -> None:
    """Waits until one rank of each node has looked. Ranks that do not answer are reported by `run.check_all`."""
    ranks = scene.ranks
    deadline = time.monotonic() + ranks.limit_s / 2
    while ranks.store.add("shared seen", 0) < len(ranks.firsts()) and time.monotonic() < deadline:
        time.sleep(0.02)


def compare(answers: Answers) -> list[Row]:
    return rate_rows(NAME, "writes", answers)


def compare_shared(answers: Answers) -> list[Row]:
    seen = answers.of("seen")
    if not seen:
        return []
    place = answers.values[min(seen)]["place"]
    blind = sorted(rank for rank, value in seen.items() if not value)
    if not blind:
        return [Row(SHARED, OK, f"{len(seen)} nodes see the files of the first one in {place}")]
    verb = "does" if len(blind) == 1 else "do"
    text = f"{ranks_named(blind, answers.nodes)} {verb} not see the file that rank 0 made in {place}"
    return [Row(SHARED, FAILED, text, "mount one file system there on all nodes, or name another output=...")]


CHECK = Check(NAME, _look, "the disk with the run's folder does not answer on this node", compare=compare)
SHARED_CHECK = Check(
    SHARED, _look_shared, "the disk with the run's folder does not answer", together=True, compare=compare_shared
)
