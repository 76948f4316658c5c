"""Checks the sources: whether each node can read them, and how fast."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from statistics import median_low
from typing import BinaryIO

from univitar_ds.data.shards.sources import SourceShard, spread
from univitar_ds.data.shards.tar_index import BLOCK, Damage, scan
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import S3, StorageSettings
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, REMEDIES, Answers, Found, Row

NAME = "storage"
MOST_BYTES, PIECE, SHARDS = 64 << 20, 4 << 20, 8
"""At most SHARDS shards are read, evenly spread over all: PIECE bytes at a time, at most MOST_BYTES in total."""
MOST_S = 5.0
"""Seconds after which no further piece is read."""
HEAD = 1 << 16
"""Bytes in which the first sample of a shard is searched; the sample may be longer."""


def read_rate(shards: Sequence[SourceShard], settings: StorageSettings) -> tuple[int, float]:
    """Reads the beginnings of some shards. Returns (bytes, seconds). Raises: DataError if a shard cannot be read."""
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


def damaged(shards: Sequence[SourceShard], settings: StorageSettings) -> Row | None:
    """Returns a failed row if a shard of those that `read_rate` reads does not begin or end as a tar with samples."""
    for shard in spread(shards, SHARDS):
        with RangeReader(storage_for(shard.path, settings), shard.path, shard.size).buffered() as stream:
            fault = _fault_of_edges(stream, shard.path, shard.size)
        if fault is not None:
            return Row(NAME, FAILED, fault, REMEDIES[NAME])
    return None


def _fault_of_edges(stream: BinaryIO, path: str, size: int) -> str | None:
    """Returns what is wrong with the first sample or the end of a shard, without reading what is between them."""
    first = next(scan(stream, path, min(size, HEAD)), None)
    if first is None:
        return f"shard {path}: holds no sample"
    if isinstance(first, Damage) and (first.kind == "damaged" or size <= HEAD):
        return first.message.rpartition("; ")[0]
    stream.seek(max(0, size - BLOCK))
    return f"shard {path}: cut off at byte {size}, it does not end as a tar" if any(stream.read(BLOCK)) else None


def _forget(path: str) -> None:
    """Drops a local file from the page cache, so that the rate is that of the disk."""
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


def _check(context: Context) -> Found:
    if not context.shards or context.config is None:
        return Found()
    settings = StorageSettings.of(context.config.data)
    size, seconds = read_rate(context.shards, settings)
    row = damaged(context.shards, settings)
    return Found([] if row is None else [row], values={"mb_s": size / 1e6 / max(seconds, 1e-6), "mb": size / 1e6})


def compare(answers: Answers) -> list[Row]:
    """Returns a row with the rates at which the nodes read the sources."""
    return rate_rows(NAME, "reads", answers)


def rate_rows(name: str, verb: str, answers: Answers) -> list[Row]:
    """Returns a row with the median of the rates `mb_s` of all nodes and the slowest node; none without rates."""
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


CHECK = Check(NAME, _check, "the disk or store of the sources does not answer on this node", compare=compare)
