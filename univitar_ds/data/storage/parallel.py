"""Maps a function over many small requests to storages: concurrently for remote ones, sequentially for local ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from univitar_ds.data.storage.base import Storage
from univitar_ds.data.storage.local import LocalStorage

AT_ONCE = 16
"""Number of concurrent requests, which hides the latency of a remote store."""
_Argument, _Result = TypeVar("_Argument"), TypeVar("_Result")


def at_once(
    work: Callable[[_Argument], _Result],
    pieces: Sequence[_Argument],
    storages: Iterable[Storage],
    threads: int = AT_ONCE,
) -> Iterator[_Result]:
    """Yields `work(piece)` for each piece in order, computed in up to `threads` threads.

    No threads are used if all `storages` are local: their latency is low, and every thread would keep a malloc arena.
    """
    if min(threads, len(pieces)) <= 1 or all(isinstance(storage, LocalStorage) for storage in storages):
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(threads) as executor:
        yield from executor.map(work, pieces)
