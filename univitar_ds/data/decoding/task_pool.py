"""A pool of processes that work on shards, in which samples may crash or hang a process.

A process works on one shard and reports every sample before it reads it. If the process dies or stops reporting, that
sample is reported as bad, and another process continues with the next sample.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, NamedTuple

from univitar_ds.data.decoding import children
from univitar_ds.errors import DataError

_LOOK_EVERY_S = 1.0
_START_S = 60.0
"""Seconds that a process may take to start, in addition to `silence_s`."""


class Read(NamedTuple):
    """So many bytes have been processed since the last event."""

    bytes: int


class Hashed(NamedTuple):
    """The whole shard has been read."""

    sha256: str


class At(NamedTuple):
    """The sample at bytes [offset, end) is read next; events about it follow."""

    offset: int
    end: int
    key: str


class Bad(NamedTuple):
    """A sample that cannot be used; with key "", damage in the shard."""

    kind: str
    key: str
    offset: int
    message: str


class Noted(NamedTuple):
    """Content of a usable sample was ignored."""

    kind: str
    key: str
    offset: int
    message: str


class Unread(NamedTuple):
    """Extensions of a sample's members that the loader does not read."""

    extensions: tuple[str, ...]


class SeveralLines(NamedTuple):
    """The .txt of a sample has several lines, which are read as one caption."""


class Scattered(NamedTuple):
    """The members of a sample are not consecutive: there are more at this byte."""

    key: str
    offset: int


class Done(NamedTuple):
    """The shard is finished. `error`: why the rest of it could not be read."""

    error: str | None = None


class _Fault(NamedTuple):
    """A bug; `detail` is its traceback."""

    detail: str


Event = Read | Hashed | At | Bad | Noted | Unread | SeveralLines | Scattered | Done


@dataclass(frozen=True)
class Task:
    """A shard to work on: its number, data for the work function (`job`), and the byte of a header to start at."""

    number: int
    job: Any
    start: int = 0
    hashed: bool = False


Work = Callable[[Task, Callable[[Event], None]], None]
"""Works on a task and reports events through the callback. Raises: DataError if the shard cannot be read."""


@dataclass
class _Worker:
    """A process, the time of its last event, its task and the last sample that it reported."""

    process: BaseProcess
    channel: Connection
    last_event: float
    task: Task | None = None
    at: At | None = None


class TaskPool:
    """A context manager that owns the processes and ends them on exit."""

    def __init__(self, work: Work, workers: int, silence_s: float) -> None:
        """Args: a module-level function; number of processes; seconds without an event after which one has hung."""
        assert workers >= 1, workers
        self._work, self._workers, self._silence_s = work, workers, silence_s
        self._running: list[_Worker] = []
        self._failed_at_start: set[int] = set()

    def __enter__(self) -> TaskPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.process.kill()
            worker.process.join()
            worker.channel.close()
        self._running.clear()

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Event]]:
        """Yields every event with the number of its task; the last event of each task is `Done`.

        Raises: RuntimeError for a bug in a process.
        """
        waiting = deque(tasks)
        while waiting or any(worker.task for worker in self._running):
            self._assign(waiting)
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
                    yield from self._lost(worker, "crash", detail, waiting)
                    continue
                if isinstance(event, _Fault):
                    raise RuntimeError(f"shard number {number}:\n{event.detail}")
                self._follow(worker, event)
                yield number, event
            silent = [it for it in busy.values() if it.task and monotonic() - it.last_event > self._silence_s]
            for worker in silent:
                detail = f"its process reported nothing for {self._silence_s:g} seconds"
                yield from self._lost(worker, "timeout", detail, waiting)

    def _assign(self, waiting: deque[Task]) -> None:
        idle = [worker for worker in self._running if worker.task is None]
        while waiting and (idle or len(self._running) < self._workers):
            worker = idle.pop() if idle else self._start()
            worker.task, worker.at, worker.last_event = waiting.popleft(), None, max(worker.last_event, monotonic())
            with suppress(ConnectionError):  # it died while idle, which `run` detects when it reads the next event
                worker.channel.send(worker.task)

    def _start(self) -> _Worker:
        context = children.context([self._work.__module__])
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

    def _follow(self, worker: _Worker, event: Event) -> None:
        assert worker.task is not None
        worker.last_event = monotonic()
        if isinstance(event, At):
            worker.at = event
        elif isinstance(event, Hashed):
            worker.task = replace(worker.task, hashed=True)
        elif isinstance(event, Done):
            worker.task = None

    def _lost(self, worker: _Worker, kind: str, detail: str, waiting: deque[Task]) -> Iterator[tuple[int, Event]]:
        """Handle the end of a process: its sample is bad. A shard is given up if two end before reporting a sample."""
        assert worker.task is not None
        self._running.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.channel.close()
        task, at = worker.task, worker.at
        if at is not None:
            yield task.number, Bad(kind, at.key, at.offset, detail)
            waiting.appendleft(replace(task, start=at.end))
        elif task.number in self._failed_at_start:
            yield (
                task.number,
                Done(f"{detail}, twice, before any sample from byte {task.start} on; the rest is skipped"),
            )
        else:
            self._failed_at_start.add(task.number)
            waiting.appendleft(task)


def _serve(channel: Connection, work: Work) -> None:
    """Work on tasks until the other end of the channel closes."""
    children.begin()
    try:
        while True:
            task = channel.recv()
            channel.send(Read(0))
            try:
                work(task, channel.send)
            except DataError as error:
                channel.send(Done(str(error)))
            except ConnectionError:
                return
            except Exception:
                channel.send(_Fault(traceback.format_exc()))
            else:
                channel.send(Done())
    except (EOFError, ConnectionError):
        return
