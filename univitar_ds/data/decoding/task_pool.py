"""Work in processes that may die or hang of what they read, with nothing lost but the item at fault.

A process works on one task and reports every item before it touches it. Where it dies or falls silent, that item is to
blame, and another process goes on behind it.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, Literal, NamedTuple

from univitar_ds.data.decoding import children
from univitar_ds.errors import UserError

_LOOK_EVERY_S = 1.0
_START_S = 60.0
"""What a process may take to start, beside the silence it is allowed afterwards."""


class Next(NamedTuple):
    """This item comes next. If its process ends over it, another begins at `resume`."""

    item: Any
    resume: Any


class Reached(NamedTuple):
    """If the process ends before its next item, another begins at `resume`. The pool does not pass it on."""

    resume: Any


class Lost(NamedTuple):
    """The process of this item died, or nothing was heard of it for too long and it was ended."""

    item: Any
    kind: Literal["crash", "timeout"]
    detail: str


class Done(NamedTuple):
    """The task is finished; with an error, as far as it could be."""

    error: str | None = None


class _Fault(NamedTuple):
    """An error of the program."""

    detail: str


@dataclass(frozen=True)
class Task:
    """Something to work on: `number` among all tasks; `job` and `start`, where to begin, are the work's own."""

    number: int
    job: Any
    start: Any = None


Work = Callable[[Task, Callable[[Any], None]], None]
"""Called with a task and what takes its events: `Next`, `Reached` and results of its own, which can be pickled. It may
raise a UserError for a task that cannot be finished."""


@dataclass
class _Worker:
    """A process, what it works on and the last item that it reported."""

    process: BaseProcess
    channel: Connection
    heard: float
    task: Task | None = None
    at: Next | None = None


class TaskPool:
    """A context manager around the processes; they end with it."""

    def __init__(self, work: Work, workers: int, silence_s: float, preload: Sequence[str] = ()) -> None:
        """Args: a function of a module; how many processes; seconds without an event after which one has hung;
        modules that the work imports late, to have them in memory once."""
        assert workers >= 1, workers
        self._work, self._workers, self._silence_s = work, workers, silence_s
        self._preload = [work.__module__, *preload]
        self._running: list[_Worker] = []
        self._barren: set[int] = set()

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
        self._running.clear()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Any]]:
        """Every event with the number of its task, as they come; the last of each task is `Done`.

        Raises: RuntimeError for an error of the program in a process.
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
                self._follow(worker, event)
                if not isinstance(event, Reached):
                    yield number, event
            silent = [it for it in busy.values() if it.task and monotonic() - it.heard > self._silence_s]
            for worker in silent:
                detail = f"nothing was heard of its process for {self._silence_s:g} seconds"
                number = worker.task.number
                yield from ((number, event) for event in self._lost(worker, "timeout", detail, again))

    def _assign(self, coming: Iterator[Task], again: deque[Task]) -> bool:
        """Give tasks to idle processes, starting as many as may be. Returns False if there is nothing left to do."""
        idle = [worker for worker in self._running if worker.task is None]
        while idle or len(self._running) < self._workers:
            task = again.popleft() if again else next(coming, None)
            if task is None:
                break
            worker = idle.pop() if idle else self._start()
            worker.task, worker.at, worker.heard = task, None, max(worker.heard, monotonic())
            with suppress(ConnectionError):  # it died idle: waiting for its first event finds out
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

    def _follow(self, worker: _Worker, event: Any) -> None:
        assert worker.task is not None
        worker.heard = monotonic()
        if isinstance(event, Next):
            worker.at = event
        elif isinstance(event, Reached):
            worker.task = replace(worker.task, start=event.resume)
        elif isinstance(event, Done):
            worker.task = None

    def _lost(
        self, worker: _Worker, kind: Literal["crash", "timeout"], detail: str, again: deque[Task]
    ) -> Iterator[Lost | Done]:
        """The end of a process: its item is lost. A task that ends two before its first item is given up."""
        assert worker.task is not None
        self._running.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.channel.close()
        task, at, worker.task = worker.task, worker.at, None
        if at is not None:
            again.append(replace(task, start=at.resume))
            yield Lost(at.item, kind, detail)
        elif task.number in self._barren:
            yield Done(f"{detail}, twice, before its first item; the rest of it is left out")
        else:
            self._barren.add(task.number)
            again.append(task)


def _serve(channel: Connection, work: Work) -> None:
    """Work off tasks until the other end closes."""
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
