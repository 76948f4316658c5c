"""A pool of processes that work on tasks made of items, in which an item may crash or hang a process.

A process works on one task and reports every item before reading it. If the process dies or stops reporting, another
process tries the last reported item again. If that one ends too, the item is lost, and a third one continues after it.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, Literal, NamedTuple

from univitar_ds.data.decoding import children
from univitar_ds.errors import UserError

_LOOK_EVERY_S = 1.0
_START_S = 60.0
"""Maximum seconds for the start of a process, in addition to `silence_s`."""


class Next(NamedTuple):
    """The event that an item is processed next.

    If the process ends during the item, another process starts at `retry`, with this item. If that process ends during
    it too, the item is lost, and a third process continues at `resume`.

    The system may kill any process, for example if memory runs out, so the item counts as the cause only after two."""

    item: Any
    retry: Any
    resume: Any


class Reached(NamedTuple):
    """The event that work has reached `resume`, where another process would continue. Not yielded by `TaskPool.run`."""

    resume: Any


class Lost(NamedTuple):
    """The event that two processes died during an item, or were ended because they reported nothing for too long."""

    item: Any
    kind: Literal["crash", "timeout"]
    detail: str


class Done(NamedTuple):
    """The event that a task is finished. `error`: why the rest of the task could not be processed."""

    error: str | None = None


class _Fault(NamedTuple):
    """The event of a bug. `detail`: the traceback."""

    detail: str


@dataclass(frozen=True)
class Task:
    """A task: its number, and for the work function the data (`job`) and the position to start at."""

    number: int
    job: Any
    start: Any = None


Work = Callable[[Task, Callable[[Any], None]], None]
"""Works on a task and reports events through the callback: `Next`, `Reached`, and its own results, which are pickled.
Raises: UserError if the task cannot be finished."""


@dataclass
class _Worker:
    """A process, the time of its last event, its task, the last item that it reported and the events since then.

    These events are dropped if the process ends, since they are reported again."""

    process: BaseProcess
    channel: Connection
    last_event: float
    task: Task | None = None
    at: Next | None = None
    events: list[Any] = field(default_factory=list)


class TaskPool:
    """A context manager that owns the processes and ends them on exit."""

    def __init__(self, work: Work, workers: int, silence_s: float, preload: Sequence[str] = ()) -> None:
        """Creates a pool without processes; `run` starts them.

        Args: work: a module-level function; workers: number of processes; silence_s: seconds without an event after
            which a process counts as hung; preload: modules to import before forking, so that they are in memory once.
        """
        assert workers >= 1, workers
        self._work, self._workers, self._silence_s = work, workers, silence_s
        self._preload = [work.__module__, *preload]
        self._running: list[_Worker] = []
        self._failed_at: dict[int, Any] = {}
        """By number of the task: `Next.retry` of the item during which a process ended, or None before the first."""

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
        self._running.clear()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Yields every event with the number of its task; the last event of each task is `Done`.

        Raises: RuntimeError for a bug in a process.
        """
        coming, again = iter(tasks), deque[Task]()
        while self._assign(coming, again):
            busy = {worker.channel: worker for worker in self._running if worker.task}
            for channel in wait(list(busy), timeout=min(_LOOK_EVERY_S, self._silence_s / 2)):
                worker = busy[channel]
                assert worker.task is not None
                number = worker.task.number
                try:
                    event = worker.channel.recv()
                except (EOFError, ConnectionError):
                    worker.process.join()
                    detail = f"the process that worked on it died (exit code {worker.process.exitcode})"
                    yield from ((number, event) for event in self._lost(worker, "crash", detail, again))
                    continue
                if isinstance(event, _Fault):
                    raise RuntimeError(f"task number {number}:\n{event.detail}")
                yield from ((number, finished) for finished in self._follow(worker, event))
            silent = [it for it in busy.values() if it.task and monotonic() - it.last_event > self._silence_s]
            for worker in silent:
                detail = f"its process reported nothing for {self._silence_s:g} seconds"
                number = worker.task.number
                yield from ((number, event) for event in self._lost(worker, "timeout", detail, again))

    def _assign(self, coming: Iterator[Task], again: deque[Task]) -> bool:
        """Gives tasks to idle processes and starts processes if needed. Returns False if all tasks are finished."""
        idle = [worker for worker in self._running if worker.task is None]
        while idle or len(self._running) < self._workers:
            task = again.popleft() if again else next(coming, None)
            if task is None:
                break
            worker = idle.pop() if idle else self._start()
            worker.task, worker.at, worker.last_event = task, None, max(worker.last_event, monotonic())
            worker.events = []
            with suppress(ConnectionError):  # it died while idle, which `run` detects when it reads the next event
                worker.channel.send(worker.task)
        return any(worker.task for worker in self._running)

    def _start(self) -> _Worker:
        context = children.context(self._preload)
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        try:
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        worker = _Worker(process, ours, monotonic() + _START_S)
        self._running.append(worker)
        return worker

    def _follow(self, worker: _Worker, event: Any) -> list[Any]:
        """Updates the worker. Returns the events that are final: those of an item, once the next one begins."""
        assert worker.task is not None
        worker.last_event = monotonic()
        if isinstance(event, Next):
            final, worker.events, worker.at = worker.events, [event], event
            return final
        if isinstance(event, Reached):
            worker.task = replace(worker.task, start=event.resume)
            final, worker.events = worker.events, []
            return final
        worker.events.append(event)
        if worker.at is not None and not isinstance(event, Done):
            return []
        if isinstance(event, Done):
            worker.task = None
        final, worker.events = worker.events, []
        return final

    def _lost(
        self, worker: _Worker, kind: Literal["crash", "timeout"], detail: str, again: deque[Task]
    ) -> Iterator[Next | Lost | Done]:
        """Handles the end of a process. If it is the second one at this place, its item is lost, or the rest of the
        task if no item was reported."""
        assert worker.task is not None
        self._running.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.channel.close()
        task, at, worker.task = worker.task, worker.at, None
        place = None if at is None else at.retry
        first = task.number not in self._failed_at or self._failed_at[task.number] != place
        self._failed_at[task.number] = place
        if first:
            again.append(task if at is None else replace(task, start=at.retry))
        elif at is not None:
            again.append(replace(task, start=at.resume))
            yield at
            yield Lost(at.item, kind, detail)
        else:
            yield Done(f"{detail}, twice, before its first item; the rest of it is left out")


def _serve(channel: Connection, work: Work) -> None:
    """Works on tasks until the other end of the channel closes."""
    children.begin()
    try:
        while True:
            task = channel.recv()
            channel.send(Reached(task.start))
            try:
                work(task, channel.send)
            except UserError as error:
                channel.send(Done(str(error)))
            except ConnectionError:
                return
            except Exception:
                channel.send(_Fault(traceback.format_exc()))
            else:
                channel.send(Done())
    except (EOFError, ConnectionError):
        return
