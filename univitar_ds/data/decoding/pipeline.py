"""Plans in, decoded packs out, in the order of the plans, with decoding in processes ahead of the trainer.

A planner thread draws plans; one thread per decoding process hands it a plan and a free slot and waits for
its answer. Delivery lends the slot itself: it is free again when nobody holds the pixels any more. A trainer that
holds many packs at a time gets copies of the later ones, so that decoding never waits for a pack to be dropped.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import numpy as np

from univitar_ds.data.decoding.decode_job import DecodeJob, Failure, decode_pack
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.probe_job import ProbeItem, ProbeJob
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.decoding.supervisor import PATIENCE_S, Closed, RestartBudget, WorkerSupervisor
from univitar_ds.data.decoding.worker import Need
from univitar_ds.data.media.prober import MediaAddress, Prober, probe_each
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.errors import SampleError

Plan = TypeVar("Plan")
"""What is to be decoded; a function makes a job of it."""
PlansOf = Callable[[Prober], Iterator[Plan]]
"""Makes the plans, given what reads the sizes of files."""


@dataclass(frozen=True)
class DecodedPack(Generic[Plan]):
    """A decoded pack: `pixels` (B,) uint8, without the items in `failures`; nothing overwrites them while held."""

    plan: Plan
    pixels: np.ndarray
    failures: Sequence[Failure]


_Outcome = tuple[int, DecodeJob, DecodedPack[Any]] | BaseException


def decoded_inline(
    plans_of: PlansOf[Plan], job_of: Callable[[Plan], DecodeJob], settings: StorageSettings = LOCAL
) -> Generator[DecodedPack[Plan]]:
    """The same packs as `Pipeline` gives, decoded in the calling thread when asked for; headers are read there too."""
    for plan in plans_of(probe_each):
        job = job_of(plan)
        buffer = np.empty(job.bytes, np.uint8)
        failures = decode_pack(job, buffer, settings)
        yield DecodedPack(plan, buffer[: _used(job, failures)], failures)


@dataclass(frozen=True)
class PipelineConfig:
    """How many packs and processes a `Pipeline` has, and what they need.

    `slot_bytes` are the most that a plan's pixels take. Of `max_held_slots` packs the trainer may hold the slots, those
    beyond are copied; while it holds as many, `shared_slots` fewer are decoded ahead. `restarts` is how often a process
    that died may be replaced, `patience_s` after how long without a finished item one has hung. `needs`: what the plans
    need, see `worker.PRELOADED`. `settings`: how the processes reach the shards.
    """

    workers: int
    prefetch_packs: int
    slot_bytes: int
    max_image_px: int
    max_held_slots: int = 4
    shared_slots: int = 0
    restarts: int = 0
    patience_s: float = PATIENCE_S
    needs: Collection[Need] = ("image", "video")
    settings: StorageSettings = LOCAL

    def __post_init__(self) -> None:
        assert min(self.workers, self.prefetch_packs, self.max_held_slots) >= 1, self
        assert 0 <= self.shared_slots < self.ahead, self

    @property
    def ahead(self) -> int:
        """Packs that are decoded before they are asked for."""
        return max(self.prefetch_packs, self.workers)

    @property
    def slots(self) -> int:
        return self.ahead + self.max_held_slots - self.shared_slots


class Pipeline(Generic[Plan]):
    """An iterator over decoded packs. Close it, or use it as a context manager."""

    def __init__(self, plans_of: PlansOf[Plan], job_of: Callable[[Plan], DecodeJob], config: PipelineConfig) -> None:
        """Start the decoding processes, and one more once the plans need the size of a file."""
        self._config = config
        self._job_of = job_of
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Plan]] = deque()
        self._done: dict[int, _Outcome] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._undelivered = self._lent = 0
        self._slots = SharedSlots.create(config.slots + 1, config.slot_bytes)
        self._free = list(range(config.slots))
        self._server = ForkServer(self._slots, config.needs)
        allowed = RestartBudget(config.restarts)
        self._supervisors = [
            WorkerSupervisor(number, self._server, self._slots, config.settings, allowed, config.patience_s)
            for number in range(config.workers + 1)
        ]
        self._plans = plans_of(self._probe)
        self._threads = [threading.Thread(target=self._draw_plans, name="planner", daemon=True)]
        for supervisor in self._supervisors[: config.workers]:
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
            lend = self._lent < self._config.max_held_slots
            self._lent += lend
        slot, job, rendered = outcome
        room = self._slots.view(slot)
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
        """End the processes and threads and free their memory. Safe to call from any thread, at any time and again."""
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
            self._slots.close()

    def _probe(self, media: Sequence[MediaAddress]) -> list[MediaSize | SampleError]:
        """A `Prober` for the planner, in a process of its own: a header may do to it what an image may do to a decoder.

        It counts what it has read at a slot that no pack gets.
        """
        items = [ProbeItem(*address[1:]) for address in media]
        return self._supervisors[-1].probe(self._config.slots, ProbeJob(items, self._config.max_image_px))

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
                self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._config.ahead)
                if self._stopped:
                    return
                self._waiting.append((number, plan))
                self._changed.notify_all()

    def _keep_busy(self, supervisor: WorkerSupervisor) -> None:
        """Keep one process busy. Slot and plan are taken together, so that the oldest plan has a slot or gets the next.

        One is free whenever none is undelivered, because there are more than `max_held_slots`.
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
        return bool(self._waiting) and bool(self._free) and self._undelivered < self._config.ahead

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
