"""The phases of a training step: what a rank does now, and the time that it spends in each phase.

Code marks its phases with `phase` and `section`. Two readers use the marks: the metrics have the seconds of every
phase, and the watchdog reads the position of the rank from another thread. The time of a nested phase counts only for
that phase, so that the phases of a step add up to the step. In a process without an active clock the marks do nothing.

On a GPU a mark is a CUDA event on the stream of the step. The times are those of the GPU, which the host reads after
the step without waiting for it. On a CPU a mark is a reading of the clock.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

DATA, FORWARD, BACKWARD, OPTIMIZER = "data_wait", "forward", "backward", "optimizer"
COLLECTIVES = "collectives"
"""Collective calls, including the wait for other ranks, in whichever phase they are made."""
OTHER = "other"
"""The rest of a step: the loss, the teacher, reading metrics."""
PHASES = (DATA, FORWARD, BACKWARD, OPTIMIZER, COLLECTIVES, OTHER)

START, FIRST_STEPS, STEP, CHECKPOINT, EVALUATION = "start", "first steps", "step", "checkpoint", "evaluation"
MID_EVALUATION = "evaluation during training"
"""Sections of a run, which the watchdog gives different limits. EVALUATION is the one after training."""
SETTLING = 3
"""Steps after a start that count as first steps: kernels are compiled, memory is reserved, caches are cold."""
REMEMBERED = 64
"""Number of last steps whose durations are kept, for the median."""


class Marks(Protocol):
    """Points in time on the device of a step."""

    def mark(self) -> Any:
        """Returns the current point; None if this thread uses another stream than the step."""

    def passed(self, mark: Any) -> bool:
        """Returns whether the device has passed a point, without waiting for it."""

    def seconds(self, first: Any, last: Any) -> float:
        """Returns the time between two points that the device has passed."""

    def reuse(self, mark: Any) -> None:
        """Lets `mark` return a mark again that is no longer needed."""


class HostMarks:
    """The clock of the host, for steps that compute there."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def reuse(self, mark: float) -> None:
        pass


class DeviceMarks:
    """CUDA events on the stream that is current when the object is created."""

    def __init__(self, cuda: Any = torch.cuda) -> None:
        """Args: cuda: a module with the streams and events of `torch.cuda`."""
        self._cuda, self._stream = cuda, cuda.current_stream()
        self._free: list[Any] = []

    def mark(self) -> Any:
        if self._cuda.current_stream() != self._stream:
            return None
        event = self._free.pop() if self._free else self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def passed(self, mark: Any) -> bool:
        return mark.query()

    def seconds(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000

    def reuse(self, mark: Any) -> None:
        self._free.append(mark)


class Observer(Protocol):
    """An object that is called at each step and phase, such as a profiler."""

    def begin_step(self, number: int) -> None:
        """Called before a step, with its number."""

    def end_step(self, number: int) -> None:
        """Called after a step, with its number."""

    def annotate(self, name: str) -> AbstractContextManager[Any]:
        """Returns a context for a phase or call."""


@dataclass(frozen=True)
class Position:
    """What a rank does now. `since`: when the section began, by `time.monotonic`."""

    section: str
    since: float
    step: int = 0
    phase: str = OTHER
    """The innermost phase that is not a collective."""
    call: str = ""
    """The call that waits for other ranks; empty outside of such calls."""
    calls: int = 0
    """Number of calls that wait for other ranks which this rank has begun; equal on ranks that are in the same call."""


class StepClock:
    """The marks of this process. Only the main thread, and threads that it waits for, mark phases."""

    def __init__(self, marks: Marks | None = None, observer: Observer | None = None) -> None:
        self._marks = HostMarks() if marks is None else marks
        self._observer = observer
        self._running: list[tuple[Any, str]] | None = None
        """The marks of the current step, each with the phase that follows it."""
        self._ended: deque[list[tuple[Any, str]]] = deque()
        self._stack: list[tuple[str, str]] = []
        self._seconds, self._steps = Counter[str](), 0
        self._calls = 0
        self.durations: deque[float] = deque(maxlen=REMEMBERED)
        """Seconds of the last steps, by the clock of the host."""
        self.position = Position(START, time.monotonic())

    def start(self) -> None:
        """Begins the section before the first steps of a launch, of a stage, or after a rollback."""
        self._running = None
        self.durations.clear()
        self._locate(section=START)

    def begin_step(self, number: int) -> None:
        """Begins a step. A previous step that has not ended does not count."""
        if self._observer is not None:
            self._observer.begin_step(number)
        self._running = [(self._marks.mark(), OTHER)]
        self._locate(section=STEP if len(self.durations) >= SETTLING else FIRST_STEPS, step=number)

    def end_step(self) -> None:
        """Ends the current step, if there is one."""
        if self._running is None:
            return
        self._running.append((self._marks.mark(), ""))
        self._ended.append(self._running)
        self._running = None
        self.durations.append(time.monotonic() - self.position.since)
        self._read()
        if self._observer is not None:
            self._observer.end_step(self.position.step)

    def take(self) -> list[float]:
        """Returns the number of steps whose times became known since the last call, and their seconds by PHASES."""
        self._read()
        taken = [float(self._steps), *(self._seconds[name] for name in PHASES)]
        self._seconds, self._steps = Counter(), 0
        return taken

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Marks the body as a section that is not a step, such as saving a checkpoint."""
        before = self.position.section
        self._locate(section=name)
        try:
            yield
        finally:
            self._locate(section=before)

    @contextmanager
    def phase(self, name: str, call: str = "") -> Iterator[None]:
        """Marks the body as a phase. Args: call: name of the function if the phase is COLLECTIVES."""
        if call and self._stack and self._stack[-1][0] == COLLECTIVES:  # torch's calls call each other
            yield
            return
        self._calls += bool(call)
        self._stack.append((name, call))
        self._turn(name)
        try:
            with nullcontext() if self._observer is None else self._observer.annotate(call or name):
                yield
        finally:
            self._stack.pop()
            self._turn(self._stack[-1][0] if self._stack else OTHER)

    def _turn(self, name: str) -> None:
        if self._running is not None and (mark := self._marks.mark()) is not None:
            self._running.append((mark, name))
        self._locate()

    def _locate(self, section: str | None = None, step: int | None = None) -> None:
        before, (top, call) = self.position, self._stack[-1] if self._stack else (OTHER, "")
        if call:
            top = self._stack[-2][0] if len(self._stack) > 1 else OTHER
        self.position = Position(  # replaced as a whole: another thread reads it
            before.section if section is None else section,
            before.since if section is None else time.monotonic(),
            before.step if step is None else step,
            top,
            call,
            self._calls,
        )

    def _read(self) -> None:
        """Adds the times of the steps that the device has finished."""
        marks = self._marks
        while self._ended and marks.passed(self._ended[0][-1][0]):
            step = self._ended.popleft()
            for (mark, name), (following, _) in itertools.pairwise(step):
                self._seconds[name] += marks.seconds(mark, following)
            for mark, _ in step:
                marks.reuse(mark)
            self._steps += 1


_active: list[StepClock] = []
"""The clock of this process while a run trains."""


@contextmanager
def active(clock: StepClock) -> Iterator[None]:
    """During the body, `phase` and `section` mark phases and sections of `clock`."""
    _active.append(clock)
    try:
        yield
    finally:
        _active.pop()


@contextmanager
def phase(name: str, call: str = "") -> Iterator[None]:
    """Marks the body as a phase of a step: one of PHASES. Args: call: see `StepClock.phase`."""
    if not _active:
        yield
        return
    with _active[-1].phase(name, call):
        yield


@contextmanager
def section(name: str) -> Iterator[None]:
    """Marks the body as a section of a run that is not a step: CHECKPOINT, EVALUATION or MID_EVALUATION."""
    if not _active:
        yield
        return
    with _active[-1].section(name):
        yield
