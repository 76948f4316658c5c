"""Runs many small requests to storages: concurrently for remote storages, sequentially for local ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from univitar_ds.data.storage.base import Storage
from univitar_ds.data.storage.local import LocalStorage

AT_ONCE = 16
"""Concurrent requests: hides the latency of a remote store."""
_Argument, _Result = TypeVar("_Argument"), TypeVar("_Result")


def at_once(
    work: Callable[[_Argument], _Result], pieces: Sequence[_Argument], storages: Iterable[Storage], most: int = AT_ONCE
) -> Iterator[_Result]:
    """Maps `work` over `pieces` in order, in up to `most` threads; without threads if all storages are local.

    Local storages have little latency, and every thread would keep its own malloc arena.
    """
    if min(most, len(pieces)) <= 1 or all(isinstance(storage, LocalStorage) for storage in storages):
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(most) as threads:
        yield from threads.map(work, pieces)
