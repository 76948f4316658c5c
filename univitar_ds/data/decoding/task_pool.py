"""Work on many shards in processes that may die or hang of what they read, with nothing lost but the sample at fault.

A process works on one shard and reports every sample before it touches it. Where it dies or falls silent, that
sample is to blame, and another process goes on behind it.
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
"""What a process may take to start, beside the silence it is allowed afterwards."""


class Read(NamedTuple):
    """So many bytes have been gone through since the last event."""

    bytes: int


class Hashed(NamedTuple):
    """The whole shard has been read."""

    sha256: str


class At(NamedTuple):
    """The sample at bytes [offset, end) comes next; what is wrong with it follows."""

    offset: int
    end: int
    key: str


class Bad(NamedTuple):
    """A sample that cannot be used, or with key "" a stretch of the shard without samples."""

    kind: str
    key: str
    offset: int
    message: str


class Noted(NamedTuple):
    """A text of a sample that can be used was ignored."""

    kind: str
    key: str
    offset: int
    message: str


class Unread(NamedTuple):
    """Extensions of a sample's members that nothing reads."""

    extensions: tuple[str, ...]


class SeveralLines(NamedTuple):
    """The .txt of a sample has several lines, which are read as one caption."""


class Scattered(NamedTuple):
    """The members of a sample do not follow one another: some come again at this byte."""

    key: str
    offset: int


class Done(NamedTuple):
    """The shard is finished; with an error, as far as it could be read."""

    error: str | None = None


class _Fault(NamedTuple):
    """An error of the program."""

    detail: str


Event = Read | Hashed | At | Bad | Noted | Unread | SeveralLines | Scattered | Done


@dataclass(frozen=True)
class Task:
    """A shard to work on: `number` among all of them, `start`, the byte of a header; `job` is the work's own."""

    number: int
    job: Any
    start: int = 0
    hashed: bool = False


Work = Callable[[Task, Callable[[Event], None]], None]


@dataclass
class _Worker:
    """A process, what it works on and the last sample that it reported."""

    process: BaseProcess
    channel: Connection
    heard: float
    task: Task | None = None
    at: At | None = None


class TaskPool:
    """A context manager around the processes; they end with it."""

    def __init__(self, work: Work, workers: int, silence_s: float) -> None:
        """Args: a function of a module; how many processes; seconds without an event after which one has hung."""
        assert workers >= 1, workers
        self._work, self._workers, self._silence_s = work, workers, silence_s
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

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Event]]:
        """Every event with the number of its task; the last of each task is `Done`.

        Raises: RuntimeError for an error of the program in a process.
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
            silent = [it for it in busy.values() if it.task and monotonic() - it.heard > self._silence_s]
            for worker in silent:
                detail = f"nothing was heard of its process for {self._silence_s:g} seconds"
                yield from self._lost(worker, "timeout", detail, waiting)

    def _assign(self, waiting: deque[Task]) -> None:
        idle = [worker for worker in self._running if worker.task is None]
        while waiting and (idle or len(self._running) < self._workers):
            worker = idle.pop() if idle else self._start()
            worker.task, worker.at, worker.heard = waiting.popleft(), None, max(worker.heard, monotonic())
            with suppress(ConnectionError):  # it died idle: waiting for its first event finds out
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
        worker.heard = monotonic()
        if isinstance(event, At):
            worker.at = event
        elif isinstance(event, Hashed):
            worker.task = replace(worker.task, hashed=True)
        elif isinstance(event, Done):
            worker.task = None

    def _lost(self, worker: _Worker, kind: str, detail: str, waiting: deque[Task]) -> Iterator[tuple[int, Event]]:
        """The end of a process: its sample is bad. A shard that ends two before its first sample is given up."""
        assert worker.task is not None
        self._running.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.channel.close()
        task, at = worker.task, worker.at
        if at is not None:
            yield task.number, Bad(kind, at.key, at.offset, detail)
            waiting.appendleft(replace(task, start=at.end))
        elif task.number in self._barren:
            yield task.number, Done(f"{detail}, twice, before any sample from byte {task.start} on; nothing follows it")
        else:
            self._barren.add(task.number)
            waiting.appendleft(task)


def _serve(channel: Connection, work: Work) -> None:
    """Work off tasks until the other end closes."""
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
