"""Identifies processes of this machine by id and start time, and blocks signals for processes that are started."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals by which a terminal, Slurm, a launcher or a user ends a program, often sent to all its processes."""


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


def _status(pid: int) -> list[str] | None:
    """Returns the fields of /proc/PID/stat from the state on; None if there is no such process or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name in parentheses may contain any character
