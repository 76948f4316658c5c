"""Many small questions to a storage: at the same time where each answer is a journey, else one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from univitar_ds.data.storage.base import Storage
from univitar_ds.data.storage.local import LocalStorage

AT_ONCE = 16
"""Pieces asked for at a time: a remote store answers late, but many at once."""
_Asked, _Answered = TypeVar("_Asked"), TypeVar("_Answered")


def at_once(
    work: Callable[[_Asked], _Answered], pieces: Sequence[_Asked], storages: Iterable[Storage], most: int = AT_ONCE
) -> Iterator[_Answered]:
    """What `work` makes of each piece, in order: up to `most` at a time unless all storages are local.

    Those answer at once, and every thread would leave a heap of its own behind.
    """
    if min(most, len(pieces)) <= 1 or all(isinstance(storage, LocalStorage) for storage in storages):
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(most) as threads:
        yield from threads.map(work, pieces)
