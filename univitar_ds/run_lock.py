"""Locks the folder of a run, so that only one launch at a time writes it.

    .lock-00000003        the lock: host, processes, jobs and token of the launch that holds it, and whether it was
    released

A launch acquires the lock by exclusively creating the file with the next number, which only one launch can do. A stale
lock is replaced by the next file and removed afterwards. This works without races on every file system. The file of the
last launch stays, marked as released. The launch that holds the lock touches its file every 10 s. Other launches
compare the modification time of this file with that of a new file, so that only the clock of the file server matters.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.errors import UserError, writing
from univitar_ds.identity import JOB_LABELS, restart_message, this_job, this_machine, this_process
from univitar_ds.processes import Process

VARIABLE = "UNIVITAR_DS_RUN_LOCK"
"""Environment variable that passes `RunLock.word` to processes that are started under the lock."""
HEARTBEAT_S = 10.0
"""Seconds between two updates of the time of the lock's file."""
STALE_S = 60.0
"""Seconds without an update after which the lock is dead."""
_TRIES = 20
PAUSE_S = 0.1
"""Seconds between two attempts to acquire a lock that other launches are acquiring."""
RECENT_S = 1.0
"""Seconds after which `check(recently=True)` reads the file again."""
_NAME = re.compile(r"\.lock-(\d{8})")

logger = logging.getLogger(__name__)
_known: dict[str, RunLock] = {}
"""The locks under which this process works, by the real path of the run's folder."""


class RunLocked(UserError):
    """The error that another launch is writing the run's folder."""


class LockLost(UserError):
    """The error that another launch has taken over the run's folder."""


class RunLock:
    """The lock of the folder `run`. As a context manager, it releases the lock at the end."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.number = 0
        """Number of the lock's file; 0: not acquired."""
        self._record: dict[str, Any] = {}
        self._file: int | None = None
        self._ended = threading.Event()
        self._seen = 0.0
        self._joined = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def word(self) -> str:
        """The text with which other processes `join` or `watch` this lock; empty if it is not acquired."""
        return f"{self.number}:{self._record['token']}" if self.number else ""

    def refuse(self) -> None:
        """Raises: RunLocked if another live launch has the lock. Writes only a temporary file."""
        found = self._last()
        if found is not None:
            self._why_over(*found)

    def continues(self) -> bool:
        """Whether the last launch in this folder belongs to the same job, which was restarted since."""
        found = self._last()
        return found is not None and restart_message(this_job(os.environ), found[1].get("jobs", {})) is not None

    def take(self) -> None:
        """Acquires the lock of an existing folder. Takes over a dead lock and logs that.

        Raises: RunLocked if another launch has the lock; StorageError.
        """
        if self.number:
            return
        for _ in range(_TRIES):
            found = self._last()
            reason = None if found is None else self._why_over(*found)
            if self._make(1 if found is None else found[0] + 1):
                break
            time.sleep(PAUSE_S)
        else:
            raise RunLocked(f"{self.run} is being locked by other launches at this moment; start one run at a time")
        if reason:
            logger.warning("%s: the lock of an earlier launch is taken over: %s", self.run, reason)
        for number in self._numbers():
            if number < self.number:
                with suppress(FileNotFoundError):
                    os.unlink(self._path(number))
        self._begin()

    def join(self, word: str) -> None:
        """Shares the lock of the parent process. The lock is held as long as one of the two processes lives."""
        self.watch(word)
        if not self.number:
            return
        self.check()
        self._file = os.open(self._path(self.number), os.O_RDWR)
        self._record = json.loads(os.read(self._file, 1 << 16))
        self._record["processes"].append(this_process())
        with writing(self._path(self.number)):
            os.pwrite(self._file, _line(self._record), 0)
        self._joined = True  # the parent releases it
        self._begin()

    def watch(self, word: str) -> None:
        """Works under the lock that another process of this run has acquired. `word`: see `word`; empty: no lock."""
        number, _, token = word.partition(":")
        if number:
            self.number, self._record = int(number), {"token": token}
            _known[os.path.realpath(self.run)] = self

    def check(self, *, recently: bool = False) -> None:
        """Raises: LockLost if another launch has taken the run over; StorageError if that cannot be read.

        Args: recently: whether to skip the check if the last one was less than `RECENT_S` ago, including time during
            which the machine was suspended.
        """
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if not self.number or (recently and now - self._seen < RECENT_S):
            return
        path = self._path(self.number)
        try:
            with writing(path, "read"), open(path, "rb") as file:  # opening makes NFS read the state from the server
                record = _parsed(file.read())
        except FileNotFoundError:  # only another launch removes it
            record = {}
        if record.get("token") != self._record["token"] or os.path.exists(self._path(self.number + 1)):
            raise LockLost(
                f"{self.run} was taken over by another launch{self._successor()}; this one stops before it writes"
            )
        self._seen = now

    def release(self) -> None:
        """Marks the lock as released. May also be called if the lock was lost or never acquired."""
        self._ended.set()
        _known.pop(os.path.realpath(self.run), None)
        file, self._file, self.number = self._file, None, 0
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(RECENT_S)  # a disk that hangs does not delay the end
        if file is not None:
            with suppress(OSError):  # a full disk does not delay it either: the process ends soon
                if not self._joined:
                    os.pwrite(file, _line({**self._record, "released": True}), 0)
            os.close(file)

    def _begin(self) -> None:
        self._ended.clear()
        _known[os.path.realpath(self.run)] = self
        self._thread = threading.Thread(target=self._beat, name="lock of the run", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError, TypeError):  # the lock was released at this moment
                os.utime(self._file)  # without a time, the file server's clock is used

    def _make(self, number: int) -> bool:
        """Creates the file with this number. Returns whether this launch created it and it is the last file."""
        record = {"token": uuid.uuid4().hex, **this_machine(), "processes": [this_process()]}
        record |= {"jobs": this_job(os.environ), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "released": False}
        with writing(self._path(number)):
            try:
                file = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
            except FileExistsError:
                return False
            try:
                os.pwrite(file, _line(record), 0)
                if max(self._numbers(), default=0) == number:
                    self.number, self._record, self._file = number, record, file
                    return True
                os.unlink(self._path(number))  # other launches have later numbers
            except OSError:
                os.unlink(self._path(number))
                raise
            finally:
                if self._file != file:
                    os.close(file)
        return False

    def _why_over(self, number: int, record: dict[str, Any], age_s: float) -> str:
        """Returns why the lock is dead; empty if it was released. Raises: RunLocked if the lock is valid."""
        if record.get("released"):
            return ""
        if again := restart_message(this_job(os.environ), record.get("jobs", {})):
            return again
        machine = this_machine()
        processes = record.get("processes", [])
        here = processes and all(machine[key] and record.get(key) == machine[key] for key in machine)
        if here and not any(Process(pid, start).alive for pid, start in processes):
            return f"{_in_words(record)} has ended"
        if age_s > STALE_S:
            return f"{_in_words(record)} last updated its lock {age_s:.0f} s ago (limit {STALE_S:.0f} s)"
        raise RunLocked(
            f"{self.run} is in use by {_in_words(record)}, which updated its lock {max(age_s, 0):.0f} s ago; wait for "
            f"it or stop it, or start another run under another name=... (the lock of a dead launch expires after "
            f"{STALE_S:.0f} s)"
        )

    def _last(self) -> tuple[int, dict[str, Any], float] | None:
        """Returns number and record of the last lock, and the seconds since its heartbeat; None if there is none."""
        for _ in range(_TRIES):
            numbers = self._numbers()
            if not numbers:
                return None
            try:
                with open(self._path(max(numbers)), "rb") as file:
                    record, touched = _parsed(file.read()), os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:  # the file was superseded at this moment
                continue
            if record:
                over = record.get("released")
                return max(numbers), record, 0.0 if over else self._now() - touched
            if (age_s := self._now() - touched) > STALE_S:
                return max(numbers), record, age_s
            time.sleep(PAUSE_S)  # the record is being written
        return max(numbers, default=0), {}, 0.0

    def _now(self) -> float:
        """Returns the time of the file server's clock: the modification time of a new file."""
        probe = self.run / f".lock-probe-{uuid.uuid4().hex}"
        with writing(probe):
            file = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                return os.fstat(file).st_mtime
            finally:
                os.close(file)
                os.unlink(probe)

    def _successor(self) -> str:
        with suppress(OSError, ValueError):
            record = _parsed(self._path(max(self._numbers())).read_bytes())
            if record and record.get("token") != self._record["token"]:
                return f", {_in_words(record)}"
        return ""

    def _numbers(self) -> list[int]:
        try:
            names = os.listdir(self.run)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)

    def _path(self, number: int) -> Path:
        return self.run / f".lock-{number:08d}"


def still_ours(run: Path, *, recently: bool = False) -> None:
    """Raises LockLost if another launch has taken over the folder. Must be called before writing into the folder.

    Does nothing in a process without a lock of this folder, such as `univitar-ds eval`.
    """
    lock = _known.get(os.path.realpath(run))
    if lock is not None:
        lock.check(recently=recently)


def release_all(within_s: float = 2.0) -> None:
    """Releases all locks, for a process that ends without its context managers. Waits at most `within_s`."""
    locks = list(_known.values())
    if locks:
        thread = threading.Thread(target=lambda: [lock.release() for lock in locks], daemon=True)
        thread.start()
        thread.join(within_s)


def _line(record: dict[str, Any]) -> bytes:
    """Returns a record as JSON, padded with blanks so that one write replaces any earlier record."""
    return json.dumps(record).ljust(4096).encode() + b"\n"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _in_words(record: dict[str, Any]) -> str:
    """Describes a launch in words: host, processes, jobs."""
    if not record:
        return "a launch that has just begun"
    numbers = [str(pid) for pid, _ in record["processes"]]
    jobs = "".join(f", {JOB_LABELS[kind]} {job['id']}" for kind, job in record.get("jobs", {}).items())
    plural = "es" if len(numbers) > 1 else ""
    return f"process{plural} {' and '.join(numbers)} on host {record['host']}{jobs} (since {record['since']})"
