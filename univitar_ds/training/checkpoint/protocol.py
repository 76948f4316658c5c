"""How all ranks write one checkpoint: the jobs that each rank runs alone, and the messages between them.

`saving` is a generator of this rank's jobs. The caller runs each job, directly or in a thread, and resumes the
generator when all ranks have finished theirs, so that the same code serves synchronous and asynchronous saves. The
generator sends messages only when it is resumed, in the training thread, the only one that may communicate.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from univitar_ds.errors import CheckpointError
from univitar_ds.training.distributed.process_group import (
    World,
    all_ranks_or_none,
    gather_json_to_main,
    scatter_json,
)

CHUNK_BYTES = 8 << 20
"""Bytes that are written and hashed at once. The writing thread needs the GIL only between two chunks."""


class Part(NamedTuple):
    """Bytes that one rank writes into a file, from byte `offset` of the file."""

    name: str
    content: bytes | memoryview
    offset: int = 0


class Entry(NamedTuple):
    """A written part of a file: `bytes` bytes from byte `offset`."""

    name: str
    offset: int
    bytes: int
    sha256: str


class Content(NamedTuple):
    """What one rank writes into a checkpoint."""

    parts: Sequence[Part]
    share: Any
    """JSON value of this rank that `merge` needs on rank 0."""
    merge: Callable[[list[Any]], Iterable[Part]]
    """Called on rank 0 with the shares of all ranks, by rank. Returns further parts of the checkpoint."""
    needed: int
    """Bytes of the parts of all ranks."""


class Retention(NamedTuple):
    """Which checkpoints are kept: the newest `last`, every one whose step is a multiple of `every_steps`, and the one
    of step `best`."""

    last: int
    every_steps: int | None = None
    best: int | None = None

    def outdated(self, steps: Iterable[int]) -> list[int]:
        """Returns the steps of the checkpoints to remove. Args: steps: of all checkpoints."""
        older = sorted(steps)[: -self.last]
        return [step for step in older if step != self.best and (self.every_steps is None or step % self.every_steps)]


class NotAsWritten(CheckpointError):
    """Raised if a file differs right after it was written."""

    transient = True


class AbandonedError(Exception):
    """Raised in the thread that writes a checkpoint after the checkpoint was abandoned."""


class Target(ABC):
    """The destination of one checkpoint. Its methods do not communicate with other ranks.

    `begin`, `publish` and `clear` are called on rank 0 only.
    Raises: StorageError in any method but `clear` if the storage fails.
    """

    shares_files = True
    """Whether several ranks may write parts of one file."""
    published = False
    """On rank 0: whether the checkpoint is complete and the latest one. Only outdated ones may remain to be removed."""

    def __init__(self) -> None:
        self._abandoned = threading.Event()

    @abstractmethod
    def begin(self, needed: int) -> None:
        """Prepares the place before any rank writes. Args: needed: bytes that all ranks will write."""

    @abstractmethod
    def put(self, part: Part) -> Entry:
        """Writes a part to the storage."""

    @abstractmethod
    def check(self, entries: Sequence[Entry]) -> None:
        """Compares stored parts with their entries. Raises: NotAsWritten if one differs."""

    @abstractmethod
    def publish(self, entries: Sequence[Entry]) -> None:
        """Makes the checkpoint complete and visible to readers, and removes outdated ones."""

    @abstractmethod
    def clear(self) -> None:
        """Removes the files of a failed save. Raises nothing."""

    @property
    @abstractmethod
    def place(self) -> str | Path:
        """Path or address of the checkpoint."""

    def abandon(self) -> None:
        """Makes a `put` that is running in another thread raise AbandonedError soon."""
        self._abandoned.set()

    def pause(self, seconds: float) -> None:
        """Waits. Raises: AbandonedError as soon as `abandon` is called."""
        self._abandoned.wait(seconds)
        self.check_wanted()

    def check_wanted(self) -> None:
        """Raises: AbandonedError after `abandon`."""
        if self._abandoned.is_set():
            raise AbandonedError


Job = Callable[[], Any]
Jobs = Generator[Job, Any, None]


def saving(target: Target, content: Content, world: World) -> Jobs:
    """Yields the jobs of this rank one by one. The caller sends the result of each job back once all ranks have
    finished theirs.

    All ranks run it. If a rank fails before the last job, existing checkpoints stay unchanged.
    """
    try:
        yield lambda: target.begin(content.needed) if world.is_main else None
        entries = yield lambda: [target.put(part) for part in content.parts]
        gathered = gather_json_to_main([entries, content.share], world) or []
        by_rank = [[Entry(*entry) for entry in entries] for entries, _ in gathered]
        # Each rank reads its neighbour's parts, which verifies the content and that all ranks share one storage.
        neighbours = scatter_json([*by_rank[1:], *by_rank[:1]] if world.is_main else None, world)

        def check() -> list[Entry]:
            target.check([Entry(*entry) for entry in neighbours])
            if not world.is_main:
                return []
            further = [target.put(part) for part in content.merge([share for _, share in gathered])]
            target.check(further)
            return further

        further = yield check
        by_rank.append(further)
        yield lambda: target.publish([entry for entries in by_rank for entry in entries]) if world.is_main else None
    except Exception:
        if world.is_main:
            target.clear()
        raise


def save_now(jobs: Jobs, world: World) -> None:
    """Runs `saving` to its end. Raises: the rank's own error, or PeerFailure, see `all_ranks_or_none`."""
    job = next(jobs)
    while job is not None:
        job = run_one(jobs, job, world)


def run_one(jobs: Jobs, job: Job, world: World) -> Job | None:
    """Runs one job on all ranks. Returns the next job, None after the last. Raises: as `save_now`."""
    try:
        with all_ranks_or_none(world):
            result = job()
    except Exception as error:
        jobs.throw(error)
        raise
    return proceed(jobs, result)


def proceed(jobs: Jobs, result: Any) -> Job | None:
    """Returns the next job, None after the last. Args: result: of this rank's job, which all ranks have finished."""
    try:
        return jobs.send(result)
    except StopIteration:
        return None


def manifest_of(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entry of each file: bytes and sha256, or bytes and parts if several ranks wrote it."""
    by_name: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    files = {}
    for name, parts in by_name.items():
        if len(parts) == 1 and parts[0].offset == 0:
            files[name] = {"bytes": parts[0].bytes, "sha256": parts[0].sha256}
            continue
        parts = sorted(set(parts), key=lambda part: part.offset)
        size = max(part.offset + part.bytes for part in parts)
        files[name] = {"bytes": size, "parts": [[part.offset, part.bytes, part.sha256] for part in parts]}
    return files
