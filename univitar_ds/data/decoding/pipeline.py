"""Plans in, decoded packs out, in the order of the plans, with decoding in processes ahead of the trainer.

A planner thread draws plans; one thread per decoding process hands it a plan and a free slot of the ring and waits for
its answer. Delivery lends the slot itself: it is free again when nobody holds the pixels any more. A trainer that
holds many packs at a time gets copies of the later ones, so that decoding never waits for a pack to be dropped.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np

from univitar_ds.data.decoding.decode_job import DecodeJob, Failure, decode_pack
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.decoding.supervisor import Closed, RestartBudget, WorkerSupervisor
from univitar_ds.data.decoding.worker import Need
from univitar_ds.data.storage.base import LOCAL, StorageSettings

Plan = TypeVar("Plan")
"""What is to be decoded, whatever planned it; a function makes a job of it."""


@dataclass(frozen=True)
class DecodedPack(Generic[Plan]):
    """A decoded pack: `pixels` (B,) uint8, without the items in `failures`; nothing overwrites them while held."""

    plan: Plan
    pixels: np.ndarray
    failures: Sequence[Failure]


_Outcome = tuple[int, DecodeJob, DecodedPack[Any]] | BaseException


def decoded_inline(
    plans: Iterator[Plan], job_of: Callable[[Plan], DecodeJob], settings: StorageSettings = LOCAL
) -> Iterator[DecodedPack[Plan]]:
    """The same packs as `Pipeline` gives, decoded in the calling thread when asked for."""
    for plan in plans:
        job = job_of(plan)
        buffer = np.empty(job.bytes, np.uint8)
        failures = decode_pack(job, buffer, settings)
        yield DecodedPack(plan, buffer[: _used(job, failures)], failures)


class Pipeline(Generic[Plan]):
    """An iterator over decoded packs. Close it, or use it as a context manager."""

    def __init__(
        self,
        plans: Iterator[Plan],
        job_of: Callable[[Plan], DecodeJob],
        *,
        workers: int,
        prefetch_packs: int,
        slot_bytes: int,
        max_held_slots: int = 4,
        shared_slots: int = 0,
        restarts: int = 0,
        settings: StorageSettings = LOCAL,
        needs: Collection[Need] = ("image", "video"),
    ) -> None:
        """Start `workers` >= 1 processes.

        Args: the most bytes that a plan's pixels take; `max_held_slots`, of how many packs the trainer may hold the
            slots, those beyond are copied; `shared_slots`, how many fewer are decoded ahead while it holds as many;
            `restarts`, how often a process that died may be replaced; `settings`, how the processes reach the shards;
            `needs`, what the plans need, see `worker.PRELOADED`.
        """
        assert min(workers, prefetch_packs, max_held_slots) >= 1, (workers, prefetch_packs, max_held_slots)
        self._plans = plans
        self._job_of = job_of
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Plan]] = deque()
        self._ahead = max(prefetch_packs, workers)
        self._done: dict[int, _Outcome] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._undelivered = self._lent = 0
        self._most_lent = max_held_slots
        assert 0 <= shared_slots < self._ahead, (shared_slots, self._ahead)
        slots = self._ahead + max_held_slots - shared_slots
        self._ring = SharedSlots.create(slots, slot_bytes)
        self._free = list(range(slots))
        allowed = RestartBudget(restarts)
        self._server = ForkServer(self._ring, needs)
        self._supervisors = [
            WorkerSupervisor(number, self._server, self._ring, settings, allowed) for number in range(workers)
        ]
        self._threads = [threading.Thread(target=self._draw_plans, name="planner", daemon=True)]
        for supervisor in self._supervisors:
            serving = threading.Thread(target=self._keep_busy, args=[supervisor], name="decoder", daemon=True)
            self._threads.append(serving)
        atexit.register(self.close)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads are allowed: those that run would wait for ever
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DecodedPack[Plan]:
        """The next pack in order.

        Raises: when its turn comes, StopIteration after the last plan and whatever planning or decoding raised, such as
        DataError for a shard that cannot be read or for decoding processes that end too often; RuntimeError if the
        pipeline is closed, or gets closed by another thread meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._failure is not None or self._next in self._done)
            if self._stopped:
                raise RuntimeError("the pipeline is closed")
            if self._failure is not None:
                raise self._failure
            outcome = self._done[self._next]
            if isinstance(outcome, BaseException):
                raise outcome
            del self._done[self._next]
            self._next += 1
            lend = self._lent < self._most_lent
            self._lent += lend
        slot, job, rendered = outcome
        room = self._ring.view(slot)
        pixels = room[: _used(job, rendered.failures)]
        if lend:
            weakref.finalize(room, self._take_back, slot).atexit = False  # every view of it keeps `room` alive
        else:
            pixels = pixels.copy()
        with self._changed:
            self._undelivered -= 1
            if not lend:
                self._free.append(slot)
            self._changed.notify_all()
        return DecodedPack(rendered.plan, pixels, rendered.failures)

    def close(self) -> None:
        """End the processes and threads and free the ring. Safe to call from any thread, at any time and again."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        for supervisor in self._supervisors:
            supervisor.stop()
        try:
            self._server.close()
            for thread in self._threads:
                if thread.ident is not None and thread is not threading.current_thread():  # it has started
                    thread.join(timeout=10)
        finally:
            self._ring.close()

    def _take_back(self, slot: int) -> None:
        with self._changed:
            self._lent -= 1
            self._free.append(slot)
            self._changed.notify_all()

    def _draw_plans(self) -> None:
        for number in itertools.count():
            try:
                plan = next(self._plans)
            except BaseException as error:  # StopIteration too: whatever ends the plans ends the packs
                self._finish(number, error)
                return
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._ahead)
                if self._stopped:
                    return
                self._waiting.append((number, plan))
                self._changed.notify_all()

    def _keep_busy(self, supervisor: WorkerSupervisor) -> None:
        """Keep one process busy. Slot and plan are taken together, so that the oldest plan has a slot or gets the next.

        One is free whenever none is undelivered, because there are more than `_most_lent`: who waits is served.
        """
        try:
            supervisor.start()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._may_decode())
                    if self._stopped:
                        return
                    self._undelivered += 1
                    slot = self._free.pop()
                    sequence, plan = self._waiting.popleft()
                    self._changed.notify_all()
                self._finish(sequence, self._decode(supervisor, slot, plan))
        except Closed:
            return
        except BaseException as error:
            self._fail(error)

    def _may_decode(self) -> bool:
        return bool(self._waiting) and bool(self._free) and self._undelivered < self._ahead

    def _decode(self, supervisor: WorkerSupervisor, slot: int, plan: Plan) -> _Outcome:
        """Whatever decoding raises comes in the pack's place, so that it always comes after the same packs."""
        try:
            job = self._job_of(plan)
            return slot, job, DecodedPack(plan, np.empty(0, np.uint8), supervisor.decode_pack(slot, job))
        except Closed:
            raise
        except BaseException as error:
            return error

    def _finish(self, sequence: int, outcome: _Outcome) -> None:
        with self._changed:
            self._done[sequence] = outcome
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def _used(job: DecodeJob, failures: Sequence[Failure]) -> int:
    failed = {index for index, _, _ in failures}
    return sum(item.bytes for index, item in enumerate(job.items) if index not in failed)
