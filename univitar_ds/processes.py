"""Identifies processes of this machine by id and start time, sees whether they work, blocks signals for processes that
are started, and ends processes together with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

POLLS = 0.01
"""Share of a core that a process may use without progress: one that only polls uses less."""
TICKS_S = 0.05
"""CPU seconds that are no progress in any case, since the system counts them in ticks of 10 ms."""
DISK_BYTES = 1 << 20
"""Bytes of a disk that count as progress."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals by which a terminal, Slurm, a launcher or a user ends a program, often sent to all its processes."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Process:
    """A process of this machine: id and start in clock ticks since the boot. The id alone may be reused."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Returns the process with this id; None if there is none or it is a zombie."""
        status = _status(pid)
        return None if status is None or status[0] in "ZX" else cls(pid, int(status[19]))

    @classmethod
    def from_text(cls, text: str) -> Process:
        """Returns the process that `text` describes. Raises: ValueError if it is not the text of a process."""
        pid, started = text.split(":")
        return cls(int(pid), int(started))

    @property
    def text(self) -> str:
        """The process as "pid:started", for an environment variable or a file."""
        return f"{self.pid}:{self.started}"

    @property
    def alive(self) -> bool:
        """Whether this process still exists and is not a zombie."""
        return Process.of(self.pid) == self


def parent(pid: int) -> int:
    """Returns the process id of the parent of `pid`; 0 if there is no such process or it has no parent."""
    status = _status(pid)
    return 0 if status is None else int(status[1])


def children(pid: int) -> list[int]:
    """Returns the process ids of the children of `pid`, zombies included."""
    others = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [other for other in others if parent(other) == pid]


def done_by(pid: int) -> tuple[float, int]:
    """Returns what a process and its descendants have done: CPU seconds, those of ended children included, and bytes
    that they have read from and written to disks."""
    statuses = {int(folder.name): _status(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")}
    own, left = set(), {pid}
    while left:
        own |= left
        left = {other for other, status in statuses.items() if status and int(status[1]) in left} - own
    ticks = sum(int(value) for one in own if statuses.get(one) for value in statuses[one][11:15])
    return ticks / os.sysconf("SC_CLK_TCK"), sum(map(_disk_bytes, own))


def _disk_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:  # it has ended, or is of another user
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("read_bytes", "write_bytes")))


class Idle:
    """How long this process and its descendants have done nothing, to be asked in one thread that itself only waits.

    Args: limit_s: time in which CPU time of a hundredth of it, or a megabyte from or to a disk, is progress.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since, self._done = time.monotonic(), _own()

    def moved(self) -> bool:
        """Whether there was progress since it was last seen."""
        done = _own()
        used, moved = (abs(new - old) for new, old in zip(done, self._done, strict=True))  # less: a child has ended
        if used < max(POLLS * self._limit_s, TICKS_S) and moved < DISK_BYTES:
            return False
        self._since, self._done = time.monotonic(), done
        return True

    @property
    def seconds(self) -> float:
        """Seconds since progress was last seen."""
        return time.monotonic() - self._since


def _own() -> tuple[float, int]:
    """Returns `done_by` of this process, without the CPU seconds of this thread."""
    seconds, size = done_by(os.getpid())
    return seconds - time.thread_time(), size


def command(pid: int) -> bytes:
    """Returns the command line of `pid`, its words separated by zero bytes; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def signals_held() -> Iterator[None]:
    """Blocks `SIGNALS` in this thread during the body. Processes that are started there inherit this.

    A signal to all processes is then handled only by this process, which ends the others, even while they start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def exits_by_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into SystemExit during the body, whose `finally` blocks then run.

    A signal that this process ignores or handles already stays as it is, and so do all outside of the main thread.
    """

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if in_main and signal.getsignal(one) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies, even if this process hangs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _status(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the state on; None if there is no such process or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name in parentheses may contain any character
