"""Processes of this machine: identified beyond their process id, and the signals that reach those that we start."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals by which a terminal, Slurm, a launcher or a person ask a program to end, often sent to all its processes."""


@dataclass(frozen=True)
class Process:
    """A process of this machine, by its id and its start in clock ticks since the boot, since ids are reused."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """None if there is none, or only a zombie."""
        status = _status(pid)
        return None if status is None or status[0] in "ZX" else cls(pid, int(status[19]))

    @classmethod
    def from_text(cls, text: str) -> Process:
        pid, started = text.split(":")
        return cls(int(pid), int(started))

    @property
    def text(self) -> str:
        """For an environment variable or a file."""
        return f"{self.pid}:{self.started}"

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self


def parent(pid: int) -> int:
    """Process id of the parent of a process; 0 without one."""
    status = _status(pid)
    return 0 if status is None else int(status[1])


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, zombies included."""
    others = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [other for other in others if parent(other) == pid]


def command(pid: int) -> bytes:
    """The command line of a process, its words separated by zero bytes; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def signals_held() -> Iterator[None]:
    """Processes that this thread starts inside, and their children, get none of `SIGNALS` unless they unblock them.

    So a signal to all processes reaches only the one that ends the others, also while they start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat, beginning with the state; None without such a process, or without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name before it may contain anything
