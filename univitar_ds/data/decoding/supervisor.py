"""Supervises one decoding process, which may crash or hang, and restarts it.

If a process ends twice during a job, the items of the job are decoded one by one. An item during which the process ends
twice more is a bad sample. So an image that crashes its decoder costs one sample, the same sample in every run.
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
from univitar_ds.data.decoding.probe_job import ProbeJob
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError, SampleError

_log = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds without a finished item after which a process counts as hung. The time limit of a video, and for remote
shards `data.s3.give_up_s`, are added."""
_START_S = 120.0
_TRIES = 2


class RestartBudget:
    """The number of restarts that all decoding processes of a run share; `data.worker_restarts`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0
        self._lock = threading.Lock()

    def spend(self, reason: str) -> None:
        """Counts and logs a restart. Raises: DataError if no restart is left."""
        with self._lock:
            self._spent += 1
            left = self._limit - self._spent
        if left < 0:
            raise DataError(
                f"{reason}, and no restart is left (data.worker_restarts is {self._limit}); if memory ran out, lower "
                "data.workers or data.prefetch_packs, then resume the run"
            )
        _log.warning("%s; restarting it (restarts left: %d)", reason, left)

    def give_back(self, count: int) -> None:
        """Gives `count` restarts, which a bad sample caused, back to the budget."""
        with self._lock:
            self._spent -= count


class Closed(Exception):
    """The supervisor was asked to stop."""


class _Ended(Exception):
    """The process has ended. `kind`: kind of bad sample if an item ends the process repeatedly."""

    def __init__(self, kind: str, process: str, what: str) -> None:
        super().__init__(f"{process} {what}")
        self.kind, self.what = kind, what


Job = DecodeJob | ProbeJob
_Size = Sequence[Any] | None
"""The fields of a `MediaSize`; None if it could not be read."""


@dataclass
class _Answer:
    """The failed items, and for a `ProbeJob` the size of each item."""

    failures: list[Failure] = field(default_factory=list)
    sizes: list[_Size] = field(default_factory=list)


class WorkerSupervisor:
    """Runs jobs in one process and restarts it if it ends. Not thread-safe, except `stop`."""

    def __init__(
        self,
        number: int,
        server: ForkServer,
        slots: SharedSlots,
        settings: StorageSettings,
        restarts: RestartBudget,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """The process starts with `start` or the first job. `number`: number of the process in messages."""
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
        """Decodes a job into a slot; see `decode_job.decode_pack`.

        Raises: DataError if a shard cannot be read or the processes end too often; RuntimeError with a traceback for a
        bug; Closed after `stop`.
        """
        return self._run(slot, job).failures

    def probe(self, slot: int, job: ProbeJob) -> list[MediaSize | SampleError]:
        """Returns the size of each file; see `probe_job.probe_items`. Only the counter of the slot is used.

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
                self._restarts.spend(f"{end} while processing {job.name}")
        _log.warning("processing the items of %s one by one", job.name)
        return self._one_by_one(slot, job)

    def start(self) -> None:
        """Starts the process unless it is running."""
        while self._channel is None:
            try:
                self._start()
            except _Ended as end:
                self._restarts.spend(str(end))

    def stop(self) -> None:
        """Makes the thread that waits for the process raise `Closed`. Must be called before closing the server."""
        self._stopped = True

    def _one_by_one(self, slot: int, job: Job) -> _Answer:
        whole = _Answer()
        start, spent = 0, _TRIES
        for index, item in enumerate(job.items):
            alone = replace(job, items=[item])
            ends: list[_Ended] = []
            answer = _Answer()
            while len(ends) < _TRIES:
                try:
                    answer = self._ask(slot, start, alone)
                    break
                except _Ended as end:
                    self._restarts.spend(f"{end} while processing item {index} of {job.name}")
                    ends.append(end)
            spent += len(ends)
            if len(ends) == _TRIES:
                last = ends[-1]
                message = f"its decoding process {last.what}; {_TRIES} attempts with this item alone failed"
                answer = _Answer([(0, last.kind, message)], [None])
                self._restarts.give_back(spent)
                spent = 0
            whole.failures += [(index, kind, message) for _, kind, message in answer.failures]
            whole.sizes += answer.sizes
            start += 0 if answer.failures else alone.bytes
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
            raise self._end("crash", f"sent {word[:40]!r} instead of {worker.READY!r}")
        _log.debug("decoding process %d (pid %d) is up", self._number, self._pid)

    def _patience(self, job: Job) -> float:
        remote = self._settings.give_up_s if any("://" in item.path for item in job.items) else 0.0
        return self._patience_s + job.slow_item_s + remote

    def _end(self, kind: str, what: str = "") -> _Ended:
        """Ends the process and returns the reason. The next job starts another process.

        Without `what`, the process ended by itself, and the reason depends only on the exit code.
        """
        assert self._channel is not None
        self._channel.close()
        self._channel = None
        if self._stopped:
            raise Closed
        code = self._server.end(self._pid, hangs=bool(what))
        if self._stopped:  # `stop` was called meanwhile: not a failure
            raise Closed
        if code is None:
            what = what or "ended with the process that it was forked from"
        elif code < 0:
            what = what or f"was ended by {signal.Signals(-code).name}"
        else:
            what = what or f"ended with exit code {code}"
        return _Ended(kind, f"decoding process {self._number} (pid {self._pid})", what)
