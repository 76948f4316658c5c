"""One decoding process and all that can happen to it: it dies, it hangs, it is started again.

Items whose process ends twice are gone through one by one; an item that ends its process twice more is a bad sample.
So one image that crashes its decoder costs one sample, and it is the same sample on every run.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from univitar_ds.data.decoding import worker
from univitar_ds.data.decoding.decode_job import DecodeJob, Failure
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.probe_job import ProbeItem, ProbeJob
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError, SampleError

_log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds without a finished item after which a process counts as hung. A video may take its own limit on top, and a
remote shard what `data.s3.give_up_s` allows."""
_START_S = 120.0
_TRIES = 2


class RestartBudget:
    """How often all decoding processes of a run together may be started again; `data.worker_restarts`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0
        self._lock = threading.Lock()

    def spend(self, reason: str) -> None:
        """Raises: DataError if there is none left."""
        with self._lock:
            self._spent += 1
            left = self._limit - self._spent
        if left < 0:
            raise DataError(
                f"{reason}, and data.worker_restarts = {self._limit} decoding processes have been started again; if "
                "memory ran out lower data.workers or data.prefetch_packs, then resume the run"
            )
        _log.warning("%s; starting it again (%d more times)", reason, left)

    def give_back(self, count: int) -> None:
        """What a bad sample has cost is not held against the processes."""
        with self._lock:
            self._spent -= count


class Closed(Exception):
    """The supervisor was asked to stop."""


class _Ended(Exception):
    """The process is gone. `kind` is what an item that does this again and again counts as; `who` names the process."""

    def __init__(self, kind: str, who: str, what: str) -> None:
        super().__init__(f"{who} {what}")
        self.kind, self.what = kind, what


Job = DecodeJob | ProbeJob
_Size = Sequence[Any] | None
"""The fields of a `MediaSize`; None where it could not be read."""


@dataclass
class _Answer:
    """The items that failed, and of a `ProbeJob` the size of each item."""

    failures: list[Failure] = field(default_factory=list)
    sizes: list[_Size] = field(default_factory=list)


class WorkerSupervisor:
    """Gives work to one process and gets an answer whatever becomes of the process. For one thread, but for `stop`."""

    def __init__(
        self,
        number: int,
        server: ForkServer,
        slots: SharedSlots,
        settings: StorageSettings,
        restarts: RestartBudget,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """The process, called by its `number`, starts with `start` or the first work."""
        self._number = number
        self._server = server
        self._slots = slots
        self._settings = settings
        self._restarts = restarts
        self._patience_s = patience_s
        self._stopped = False
        self._pid = 0
        self._channel: Connection | None = None

    def decode_pack(self, slot: int, job: DecodeJob) -> list[Failure]:
        """The job done into a slot, as `decode_job.decode_pack` does it.

        Raises: DataError if a shard cannot be read or the processes end too often; RuntimeError, with its traceback,
        for a fault of the program; Closed.
        """
        return self._run(slot, job).failures

    def probe(self, slot: int, job: ProbeJob) -> list[MediaSize | SampleError]:
        """The size of each file, as `probe_job.probe_items` finds it; the slot only counts them.

        Raises: as `decode_pack`.
        """
        answer = self._run(slot, job)
        failed = {index: SampleError(kind, message) for index, kind, message in answer.failures}
        sizes = enumerate(answer.sizes)
        return [failed[index] if size is None else MediaSize(*size) for index, size in sizes]

    def _run(self, slot: int, job: Job) -> _Answer:
        for _ in range(_TRIES):
            try:
                return self._ask(slot, 0, job)
            except _Ended as end:
                self._restarts.spend(f"{end} while it had {job.name}")
        _log.warning("going through %s one by one", job.name)
        return self._one_by_one(slot, job)

    def start(self) -> None:
        """Start the process unless it runs."""
        while self._channel is None:
            try:
                self._start()
            except _Ended as end:
                self._restarts.spend(str(end))

    def stop(self) -> None:
        """To be called before the server is closed: a thread that waits for the process then gets `Closed`."""
        self._stopped = True

    def _one_by_one(self, slot: int, job: Job) -> _Answer:
        whole = _Answer()
        start, spent = 0, _TRIES
        for index, item in enumerate(job.items):
            ends: list[_Ended] = []
            answer = _Answer()
            while len(ends) < _TRIES:
                try:
                    answer = self._ask(slot, start, replace(job, items=[item]))
                    break
                except _Ended as end:
                    self._restarts.spend(f"{end} while it had item {index} of {job.name}")
                    ends.append(end)
            spent += len(ends)
            if len(ends) == _TRIES:
                last = ends[-1]
                message = f"its decoding process {last.what}, {_TRIES} times with this item alone"
                answer = _Answer([(0, last.kind, message)], [None])
                self._restarts.give_back(spent)
                spent = 0
            whole.failures += [(index, kind, message) for _, kind, message in answer.failures]
            whole.sizes += answer.sizes
            start += 0 if answer.failures or isinstance(item, ProbeItem) else item.bytes
        return whole

    def _ask(self, slot: int, start: int, job: Job) -> _Answer:
        self.start()
        assert self._channel is not None
        patience = self._patience(job)
        request = json.dumps({"slot": slot, "start": start, job.kind: job.to_json()}).encode()
        try:
            self._channel.send_bytes(request)
            done = -1
            while not self._channel.poll(patience):
                if done == (done := int(self._slots.done[slot])):
                    raise self._end("timeout", f"finished no item in {patience:g} s")
            answer = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._end("crash") from error
        if "data_error" in answer:
            raise DataError(answer["data_error"])
        if "fault" in answer:
            raise RuntimeError(f"decoding process {self._number} failed:\n{answer['fault']}")
        failures = [(index, kind, message) for index, kind, message in answer["failures"]]
        return _Answer(failures, answer.get("sizes", []))

    def _start(self) -> None:
        try:
            self._pid, self._channel = self._server.fork()
        except (EOFError, OSError) as error:
            if self._stopped:
                raise Closed from error
            raise _Ended("crash", f"decoding process {self._number}", f"could not be started ({error})") from error
        try:
            self._channel.send_bytes(json.dumps(self._settings.to_json()).encode())
            if not self._channel.poll(_START_S):
                raise self._end("timeout", f"was not ready within {_START_S:g} s")
            word = self._channel.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._end("crash") from error
        if word != worker.READY:
            raise self._end("crash", f"said {word[:40]!r} where it should have said that it is ready")
        _log.info("decoding process %d (pid %d) is up", self._number, self._pid)

    def _patience(self, job: Job) -> float:
        remote = self._settings.give_up_s if any("://" in item.path for item in job.items) else 0.0
        return self._patience_s + job.slow_item_s + remote

    def _end(self, kind: str, what: str = "") -> _Ended:
        """Leave no trace of the process; the next work starts another.

        Without `what` it ended by itself, which is reported in the same words on every run.
        """
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        if self._stopped:
            raise Closed
        code = self._server.end(self._pid, hangs=bool(what))
        if self._stopped:  # meanwhile: no failure of the process
            raise Closed
        if code is None:
            what = what or "went down with the process it was forked from"
        elif code < 0:
            what = what or f"was ended by {signal.Signals(-code).name}"
        else:
            what = what or f"ended with exit code {code}"
        return _Ended(kind, f"decoding process {self._number} (pid {self._pid})", what)
