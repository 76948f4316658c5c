"""Plans in, decoded packs out, in the order of the plans, with decoding in processes ahead of the trainer.

A planner thread draws plans; one thread per decoding process hands it a plan and a free slot of the ring and waits for
its answer. A slot is free again as soon as its pack has been delivered, because delivery copies the pixels out.
"""

from __future__ import annotations

import atexit
import itertools
import json
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Self

import numpy as np

from univitar_ds.data import worker
from univitar_ds.data.lanes import Plan
from univitar_ds.data.render import Failure, RenderJob, render
from univitar_ds.data.ring import Ring
from univitar_ds.errors import DataError

_PATIENCE_S = 120.0
"""Seconds a pack of pictures may take before its process counts as hung; clips have their own limit on top."""


@dataclass(frozen=True)
class Rendered:
    """A decoded pack: `pixels` (B,) uint8, its own memory, without the items in `failures`."""

    plan: Plan
    pixels: np.ndarray
    failures: Sequence[Failure]


JobOf = Callable[[Plan], RenderJob]


def rendered_inline(plans: Iterator[Plan], job_of: JobOf) -> Iterator[Rendered]:
    """The same packs as `Pipeline` gives, decoded in the calling thread when asked for."""
    for plan in plans:
        job = job_of(plan)
        buffer = np.empty(job.bytes, np.uint8)
        failures = render(job, buffer)
        yield Rendered(plan, buffer[: _used(job, failures)], failures)


class Pipeline:
    """An iterator over decoded packs. Close it, or use it as a context manager."""

    def __init__(
        self, plans: Iterator[Plan], job_of: JobOf, *, workers: int, prefetch_packs: int, slot_bytes: int
    ) -> None:
        """Start `workers` >= 1 processes; `slot_bytes` is the most that a plan's pixels take."""
        assert min(workers, prefetch_packs) >= 1, (workers, prefetch_packs)
        self._plans = plans
        self._job_of = job_of
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, Plan]] = deque()
        self._ahead = max(prefetch_packs, workers)
        self._done: dict[int, tuple[int, RenderJob, Rendered] | BaseException] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._ring = Ring.create(self._ahead, slot_bytes)
        self._free = list(range(self._ahead))
        self._workers = [worker.start(self._ring) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._draw_plans, name="planner", daemon=True)]
        for number, (process, channel) in enumerate(self._workers):
            arguments = (number, process, channel)
            self._threads.append(threading.Thread(target=self._attend, args=arguments, name="decoder", daemon=True))
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rendered:
        """The next pack in order.

        Raises: StopIteration after the last plan; what planning raised, when its turn comes; DataError at once if a
        decoding process has died or hangs.
        """
        with self._changed:
            assert not self._stopped, "the pipeline is closed"
            self._changed.wait_for(lambda: self._failure is not None or self._next in self._done)
            if self._failure is not None:
                raise self._failure
            outcome = self._done[self._next]
            if isinstance(outcome, BaseException):
                raise outcome
            del self._done[self._next]
            self._next += 1
        slot, job, rendered = outcome
        pixels = self._ring.view(slot)[: _used(job, rendered.failures)].copy()
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()
        return Rendered(rendered.plan, pixels, rendered.failures)

    def close(self) -> None:
        """End the processes and threads and free the ring. Safe to call again."""
        with self._changed:
            if self._stopped:
                return
            self._stopped = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        for process, _ in self._workers:
            process.kill()  # it holds nothing that an orderly end would save
            process.wait()
        for thread in self._threads:
            thread.join(timeout=10)
        for _, channel in self._workers:
            channel.close()
        self._ring.close()

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

    def _attend(self, number: int, process: subprocess.Popen[bytes], channel: Connection) -> None:
        """Keep one process busy. Slot and plan are taken together, so the oldest plan never lacks a slot."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or (self._free and self._waiting))
                if self._stopped:
                    return
                slot = self._free.pop()
                sequence, plan = self._waiting.popleft()
                self._changed.notify_all()
            try:
                job = self._job_of(plan)
                answer = _ask(channel, slot, job)
            except (EOFError, OSError) as error:
                self._fail(DataError(_obituary(number, process, plan, error)))
                return
            except BaseException as error:
                self._fail(error)
                return
            if "data_error" in answer:
                self._finish(sequence, DataError(answer["data_error"]))
            elif "fault" in answer:
                self._finish(sequence, RuntimeError(f"decoding process {number} failed:\n{answer['fault']}"))
            else:
                failures = [(index, kind, message) for index, kind, message in answer["failures"]]
                self._finish(sequence, (slot, job, Rendered(plan, np.empty(0, np.uint8), failures)))

    def _finish(self, sequence: int, outcome: tuple[int, RenderJob, Rendered] | BaseException) -> None:
        with self._changed:
            self._done[sequence] = outcome
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


def _ask(channel: Connection, slot: int, job: RenderJob) -> dict:
    """One job done by the process behind the channel. Raises: TimeoutError if it hangs, EOFError if it died."""
    channel.send_bytes(json.dumps({"slot": slot, "job": job.to_json()}).encode())
    clips = len(job.items) if job.modality == "video" else 0
    if not channel.poll(_PATIENCE_S + clips * job.limits.timeout_s):
        raise TimeoutError
    return json.loads(channel.recv_bytes())


def _obituary(number: int, process: subprocess.Popen[bytes], plan: Plan, error: Exception) -> str:
    names = [item.sample.name for item in plan.items]
    what = f"the pack of lane {plan.lane}, step {plan.index} ({len(names)} samples, {names[0]} to {names[-1]})"
    who = f"decoding process {number} (pid {process.pid})"
    if isinstance(error, TimeoutError):
        return f"{who} gave no answer in time on {what}; look for a damaged file among them and leave it out"
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return f"{who} closed its channel but still runs, on {what}; resume the run"
    if code < 0:
        return (
            f"{who} was ended by {signal.Signals(-code).name} while it had {what}; if memory ran out lower "
            "data.workers or data.prefetch_packs, then resume the run"
        )
    return f"{who} ended with exit code {code} while it had {what}; its own message is above"


def _used(job: RenderJob, failures: Sequence[Failure]) -> int:
    failed = {index for index, _, _ in failures}
    return sum(item.bytes for index, item in enumerate(job.items) if index not in failed)
