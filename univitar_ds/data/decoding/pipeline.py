"""Decodes plans in processes ahead of the trainer, and yields the packs in the order of the plans.

A planner thread iterates over the plans. For each decoding process, a thread sends a plan and a free slot of shared
memory to the process and waits for the answer. A delivered pack is a view of its slot, which is free again once no view
of it exists. If the trainer holds many packs, later packs are copied, so that decoding never waits for the trainer.
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
from univitar_ds.data.decoding.shared_slots import PageLock, SharedSlots
from univitar_ds.data.decoding.supervisor import PATIENCE_S, Closed, RestartBudget, WorkerSupervisor
from univitar_ds.data.decoding.worker import Need
from univitar_ds.data.media.prober import MediaAddress, Prober, probe_each
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.errors import SampleError

Plan = TypeVar("Plan")
"""A pack before decoding, from which `job_of` makes a DecodeJob."""
PlansOf = Callable[[Prober], Iterator[Plan]]
"""Returns the plans, given a function that reads the sizes of files."""


@dataclass(frozen=True)
class DecodedPack(Generic[Plan]):
    """A decoded pack: `pixels` (B,) uint8 without the items in `failures`; not overwritten while referenced."""

    plan: Plan
    pixels: np.ndarray
    failures: Sequence[Failure]


PLANNED_TOGETHER = 4
"""Number of packs that are planned one after another, in addition to those that wait for decoding. Between two times,
decoding displaces the planner's code and data from the processor's caches."""
_Outcome = tuple[int, DecodeJob, DecodedPack[Any]] | BaseException


def decoded_inline(
    plans_of: PlansOf[Plan], job_of: Callable[[Plan], DecodeJob], settings: StorageSettings = LOCAL
) -> Generator[DecodedPack[Plan]]:
    """Yields the same packs as `Pipeline`, but probes and decodes in the calling thread."""
    for plan in plans_of(probe_each):
        job = job_of(plan)
        buffer = np.empty(job.bytes, np.uint8)
        failures = decode_pack(job, buffer, settings)
        yield DecodedPack(plan, buffer[: _used(job, failures)], failures)


@dataclass(frozen=True)
class PipelineConfig:
    """Sizes and limits of a `Pipeline`.

    `slot_bytes` is the maximum size of a plan's pixels. The trainer may hold the slots of `max_held_slots` packs; more
    packs are copied. While it holds that many, `shared_slots` fewer packs are decoded ahead. `restarts` is the number
    of processes that may be replaced, `patience_s` the time without a finished item after which a process has hung.
    `needs`: see `worker.PRELOADED`. `settings`: access to shards.
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
        """Number of packs that are decoded ahead."""
        return max(self.prefetch_packs, self.workers)

    @property
    def slots(self) -> int:
        return self.ahead + self.max_held_slots - self.shared_slots


class Pipeline(Generic[Plan]):
    """An iterator over decoded packs. Call `close`, or use it as a context manager."""

    def __init__(
        self,
        plans_of: PlansOf[Plan],
        job_of: Callable[[Plan], DecodeJob],
        config: PipelineConfig,
        page_lock: PageLock | None = None,
    ) -> None:
        """Starts the decoding processes. One for probing starts when the planner first needs the size of a file.

        Args: page_lock: locks the slots in memory for copies to a device; None: they are not locked.
        """
        self._config = config
        self._job_of = job_of
        # One condition for each kind of thread, because waking threads that cannot continue takes CPU time.
        self._lock = threading.RLock()  # reentrant: garbage collection may call `_take_back` inside another method
        self._delivery, self._planning, self._decoding = (threading.Condition(self._lock) for _ in range(3))
        self._waiting: deque[tuple[int, Plan]] = deque()
        self._done: dict[int, _Outcome] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._undelivered = self._held = 0
        self._slots = SharedSlots.create(config.slots + 1, config.slot_bytes)
        if page_lock is not None:
            self._slots.lock(page_lock)
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
            thread = threading.Thread(target=self._keep_busy, args=[supervisor], name="decoder", daemon=True)
            self._threads.append(thread)
        atexit.register(self.close)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no thread can be started: the running threads would wait forever
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> DecodedPack[Plan]:
        """Returns the next pack in the order of the plans.

        Raises: StopIteration after the last plan. Instead of a pack, the error of its planning or decoding, such as
        DataError if a shard cannot be read or decoding processes die too often. RuntimeError if the pipeline is
        closed, also by another thread during the call.
        """
        with self._lock:
            self._delivery.wait_for(lambda: self._stopped or self._failure is not None or self._next in self._done)
            if self._stopped:
                raise RuntimeError("the pipeline is closed")
            if self._failure is not None:
                raise self._failure
            outcome = self._done[self._next]
            if isinstance(outcome, BaseException):
                raise outcome
            del self._done[self._next]
            self._next += 1
            held = self._held < self._config.max_held_slots
            self._held += held
        slot, job, pack = outcome
        room = self._slots.view(slot)
        pixels = room[: _used(job, pack.failures)]
        if held:
            weakref.finalize(room, self._take_back, slot).atexit = False  # every view of it keeps `room` alive
        else:
            pixels = pixels.copy()
        with self._lock:
            self._undelivered -= 1
            if not held:
                self._free.append(slot)
            self._decoding.notify()
        return DecodedPack(pack.plan, pixels, pack.failures)

    def close(self) -> None:
        """Ends the processes and threads and frees their memory. May be called repeatedly from any thread."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            for condition in (self._delivery, self._planning, self._decoding):
                condition.notify_all()
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
        """Reads sizes for the planner, as a `Prober`, in a separate process, because a header may crash or hang it.

        The process counts finished items in an additional slot that no pack uses.
        """
        items = [ProbeItem(*address[1:]) for address in media]
        return self._supervisors[-1].probe(self._config.slots, ProbeJob(items, self._config.max_image_px))

    def _take_back(self, slot: int) -> None:
        with self._lock:
            self._held -= 1
            self._free.append(slot)
            self._decoding.notify()

    def _draw_plans(self) -> None:
        for number in itertools.count():
            try:
                plan = next(self._plans)
            except BaseException as error:  # also StopIteration, which ends the packs
                self._finish(number, error)
                return
            with self._lock:
                if len(self._waiting) >= self._config.ahead + PLANNED_TOGETHER:
                    self._planning.wait_for(lambda: self._stopped or len(self._waiting) <= self._config.ahead)
                if self._stopped:
                    return
                self._waiting.append((number, plan))
                self._decoding.notify()

    def _keep_busy(self, supervisor: WorkerSupervisor) -> None:
        """Keeps one process busy. Gets slot and plan together, so that the oldest plan always gets the next free slot.

        A slot is free whenever no pack is undelivered, because there are more than `max_held_slots` slots.
        """
        try:
            supervisor.start()
            while True:
                with self._lock:
                    self._decoding.wait_for(lambda: self._stopped or self._may_decode())
                    if self._stopped:
                        return
                    self._undelivered += 1
                    slot = self._free.pop()
                    sequence, plan = self._waiting.popleft()
                    if len(self._waiting) <= self._config.ahead:
                        self._planning.notify()
                self._finish(sequence, self._decode(supervisor, slot, plan))
        except Closed:
            return
        except BaseException as error:
            self._fail(error)

    def _may_decode(self) -> bool:
        """Whether a plan, a slot and room ahead are there. Each event adds one of them and so wakes one thread."""
        return bool(self._waiting) and bool(self._free) and self._undelivered < self._config.ahead

    def _decode(self, supervisor: WorkerSupervisor, slot: int, plan: Plan) -> _Outcome:
        """Decodes a plan. Returns an error instead of raising it, so that it is raised in the place of this pack."""
        try:
            job = self._job_of(plan)
            return slot, job, DecodedPack(plan, np.empty(0, np.uint8), supervisor.decode_pack(slot, job))
        except Closed:
            raise
        except BaseException as error:
            return error

    def _finish(self, sequence: int, outcome: _Outcome) -> None:
        with self._lock:
            self._done[sequence] = outcome
            if sequence == self._next:
                self._delivery.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
            self._delivery.notify_all()


def _used(job: DecodeJob, failures: Sequence[Failure]) -> int:
    failed = {index for index, _, _ in failures}
    return sum(item.bytes for index, item in enumerate(job.items) if index not in failed)
