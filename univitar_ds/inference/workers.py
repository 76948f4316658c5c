"""Computes units in this process, or in several processes with a copy of the model each: one per GPU, or on the CPU."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, Protocol

import torch

from univitar_ds.data.decoding import children
from univitar_ds.errors import UserError
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.run import Weights
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.inference.reading import ItemReading, Kind, Reading, Rows, read_units
from univitar_ds.inference.sources import Unit
from univitar_ds.model.placement import feature_dtype, placed
from univitar_ds.training.distributed.process_group import uses_cuda

_AHEAD = 2
"""Number of units that a process has at a time: it decodes one while it computes features of the other."""
_MOST_WAITING = 4
"""Maximum number of units, per process, that are assigned and not yet yielded. It limits the memory of this process
while one unit takes long."""


@dataclass(frozen=True)
class Setup:
    """Settings with which a process computes features: the model's local folder, weights and type, the kind of
    features, and how items are read."""

    folder: str
    weights: Weights | None
    dtype: torch.dtype | None
    kind: Kind
    reading: Reading

    def stored(self) -> StoredModel:
        """Opens the stored model. Raises: CheckpointError."""
        return open_as(self.folder, self.weights, self.dtype)

    def read(self, rank: int, units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
        """Yields the features of the units, see `read_units`, by a model on the GPU `rank` or on the CPU."""
        yield from read_units(self.load(rank), self.kind, units, self.reading, finished)

    def load(self, rank: int) -> UniViTARModel:
        """Builds the model on the GPU `rank`, or on the CPU. Raises: CheckpointError."""
        if uses_cuda():
            torch.cuda.set_device(rank)
        return open_placed(self.stored(), rank, self.dtype)


class AnySetup(Protocol):
    """Settings with which a process computes features. They are pickled for other processes."""

    kind: Kind
    reading: ItemReading

    def read(self, rank: int, units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
        """Yields the features of the units. Args: rank: number of the process; finished: see `compute`."""


def open_as(folder: str, weights: Weights | None, dtype: torch.dtype | None) -> StoredModel:
    """Opens a stored model; `dtype` None: as stored. Raises: CheckpointError."""
    stored = open_stored(folder, weights)
    return stored if dtype is None else stored.converted(dtype)


class _Finished(NamedTuple):
    """Message of a worker: a pack of `count` items is finished."""

    count: int


class _Failed(NamedTuple):
    """Message of a worker that ends: the text of a UserError, or the traceback of a bug."""

    text: str
    bug: bool


@dataclass
class _Worker:
    """A process. `pending`: units that it has received and not finished."""

    process: BaseProcess
    channel: Connection
    pending: int = 0


def compute(
    setup: AnySetup, units: Iterator[Unit], processes: int, finished: Callable[[int], None] = lambda count: None
) -> Iterator[Rows]:
    """Yields the features of the units in order. The number of processes does not change the features.

    On the CPU, features are bitwise equal only if torch uses the same number of threads (OMP_NUM_THREADS).

    Args: finished: called with the number of items of each finished pack.
    Raises: UserError as `read_units`, or if a process ends.
    """
    if processes == 1:
        yield from setup.read(0, units, finished)
        return
    workers: list[_Worker] = []
    try:
        context = children.context([__name__])
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, setup, rank, processes), daemon=True)
            workers.append(_Worker(process, ours))
            process.start()
            theirs.close()
        yield from _distributed(workers, units, finished)
    finally:
        for worker in workers:
            if worker.process.pid is not None:
                worker.process.kill()
                worker.process.join()
            worker.channel.close()


def _distributed(workers: list[_Worker], units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
    """Assigns each unit to the worker with the fewest pending units, and yields the results in order."""
    done: dict[int, Rows] = {}
    given = coming = 0
    more = True
    while True:
        while more and given - coming < _MOST_WAITING * len(workers):
            worker = min(workers, key=lambda one: one.pending)
            if worker.pending == _AHEAD:
                break
            unit = next(units, None)
            if unit is None:
                more = False
                break
            with suppress(ConnectionError):  # the process has ended, which `_receive` reports
                worker.channel.send(unit)
            worker.pending, given = worker.pending + 1, given + 1
        busy = {worker.channel: worker for worker in workers if worker.pending}
        if not busy:
            return
        for channel in wait(list(busy)):
            message = _receive(busy[channel])
            if isinstance(message, _Finished):
                finished(message.count)
                continue
            busy[channel].pending -= 1
            done[message.unit.number] = message
        while coming in done:
            yield done.pop(coming)
            coming += 1


def _receive(worker: _Worker) -> _Finished | Rows:
    """Returns a message of a worker. Raises: UserError if it failed or has ended; RuntimeError for a bug."""
    try:
        message = worker.channel.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        raise UserError(
            f"a process ended with exit code {worker.process.exitcode} (-9: killed, by the system if memory ran out); "
            "give fewer --nproc or a smaller --token-budget; the same command continues with the first unfinished part"
        ) from None
    if isinstance(message, _Failed):
        if message.bug:
            raise RuntimeError(f"a process failed:\n{message.text}")
        raise UserError(message.text)
    return message


def _serve(channel: Connection, setup: AnySetup, rank: int, processes: int) -> None:
    """Computes units until the other end of the channel closes."""
    children.begin()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    try:
        units = iter(channel.recv, None)
        for rows in setup.read(rank, units, lambda count: channel.send(_Finished(count))):
            channel.send(rows)
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        _fail(channel, _Failed(str(error), bug=False))
    except Exception:
        _fail(channel, _Failed(traceback.format_exc(), bug=True))


def _fail(channel: Connection, message: _Failed) -> None:
    with suppress(ConnectionError):
        channel.send(message)


def open_placed(stored: StoredModel, rank: int, dtype: torch.dtype | None) -> UniViTARModel:
    """Builds the model on the GPU with this number, or on the CPU if there is none.

    Args: dtype: None: as `feature_dtype` says. Raises: CheckpointError."""
    model = UniViTARModel.of(stored)
    device = device_of(rank)
    if device.type == "cuda":
        model.module = placed(model.module, device, feature_dtype(device) if dtype is None else None)
    return model


def device_of(rank: int) -> torch.device:
    """Returns the GPU of a process, or the CPU."""
    return torch.device("cuda", rank) if uses_cuda() else torch.device("cpu")
