"""The sources: whether each node reads their bytes, and how fast."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from statistics import median_low

from univitar_ds.data.shards.sources import SourceShard, spread
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import S3, StorageSettings
from univitar_ds.doctor.findings import OK, Answers, Found, Row
from univitar_ds.doctor.scene import Check, Scene

NAME = "storage"
MOST_BYTES, PIECE, SHARDS = 64 << 20, 4 << 20, 8
"""At most SHARDS shards, evenly spread over the list, are read: PIECE bytes at a time, at most MOST_BYTES in total."""
MOST_S = 5.0


def read_rate(shards: Sequence[SourceShard], settings: StorageSettings) -> tuple[int, float]:
    """Reads parts of some shards. Returns the bytes and seconds. Raises: DataError if one cannot be read."""
    chosen = spread(shards, SHARDS)
    total, start = 0, time.monotonic()
    for shard in chosen:
        storage = storage_for(shard.path, settings)
        size = min(storage.size(shard.path), MOST_BYTES // len(chosen))
        _forget(shard.path)
        for offset in range(0, size, PIECE):
            total += len(storage.read_range(shard.path, offset, min(PIECE, size - offset)))
            if time.monotonic() - start > MOST_S:
                return total, time.monotonic() - start
    return total, time.monotonic() - start


def _forget(path: str) -> None:
    """Drops a local file from the page cache, so that the disk is read."""
    if path.startswith(S3) or not hasattr(os, "posix_fadvise"):
        return
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # reading it raises the error
        return
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _look(scene: Scene) -> Found:
    if not scene.shards or scene.config is None:
        return Found()
    size, seconds = read_rate(scene.shards, StorageSettings.of(scene.config.data))
    return Found(values={"mb_s": size / 1e6 / max(seconds, 1e-6), "mb": size / 1e6})


def compare(answers: Answers) -> list[Row]:
    return rate_rows(NAME, "reads", answers)


def rate_rows(name: str, verb: str, answers: Answers) -> list[Row]:
    """One row with the rates `mb_s` of all nodes, the slowest named."""
    rates = answers.by_node("mb_s", min)
    if not rates:
        return []
    slowest = min(rates, key=lambda node: rates[node])
    numbers = {"slowest_mb_s": rates[slowest], "median_mb_s": median_low(rates.values())}
    amount = max(answers.of("mb").values())
    text = f"{verb} {numbers['median_mb_s']:,.0f} MB/s ({amount:,.3g} MB"
    if len(rates) > 1:
        text += f" on each of {len(rates)} nodes at once, median); slowest {slowest} with {rates[slowest]:,.0f} MB/s"
    else:
        text += ")"
    return [Row(name, OK, text, numbers=numbers)]


CHECK = Check(NAME, _look, "the disk or store of the sources does not answer on this node", compare=compare)
