"""Waits that fail without progress, but not for slow progress.

    done = run_watched([sys.executable, "-m", "univitar_ds", "train", ...])     # as subprocess.run, output captured
    wait_until(lambda: path.exists(), "the first checkpoint", of={"the run": process.pid})
    code = ended(process, "the run")                                            # of a Popen
    out, err = output_of(process, "the run")

Progress is CPU time of the watched process trees (including ended children), or a heartbeat: any change of the result
of a function of the test, for work in other processes. Without progress for `IDLE_S` a wait raises `Stalled` with the
CPU time of each process; `WHOLE_S` ends endless loops. Both limits are far above the needs of any test, also on a
machine with many more busy processes than cores, where each process still gets a share of CPU time.

tests/conftest.py watches every test as a whole in the same way, for example while it waits for a lock or joins a
thread. So tests set no limits.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

IDLE_S = 60.0
WHOLE_S = 900.0
LOOK_S = 0.2
_POLLS = 0.01  # share of a core: a process that only polls uses less, one that computes uses more under any load
_TICKS = os.sysconf("SC_CLK_TCK")

Roots = Mapping[str, int] | Callable[[], Mapping[str, int]]
"""Names of processes and their ids, or a function that returns the present ones."""


class Stalled(AssertionError):
    """A wait made no progress."""


class _Process(NamedTuple):
    parent: int
    cpu_s: float


def _processes() -> dict[int, _Process]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:  # it may have ended
                fields = file.read().rpartition(b")")[2].split()
                found[int(name)] = _Process(int(fields[1]), sum(map(int, fields[11:15])) / _TICKS)
    return found


def _tree(roots: Iterable[int], processes: Mapping[int, _Process]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, process in processes.items():
        children.setdefault(process.parent, []).append(pid)
    found: set[int] = set()
    left = [pid for pid in roots if pid in processes]
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, ())
    return found


def cpu_seconds(*roots: int) -> float:
    """CPU seconds of these processes and their descendants, including ended children that were waited for."""
    processes = _processes()
    return sum(processes[pid].cpu_s for pid in _tree(roots, processes))


def marked(mark: str) -> dict[str, int]:
    """Names and ids of all processes with this NAME=value in their environment, whatever their parent is."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if mark.encode() in file.read().split(b"\0"):
                found[f"process {name}"] = int(name)
    return found


class Watch:
    """Checks processes and a heartbeat for progress when `check` is called."""

    beats: ClassVar[int] = 0
    """Number of changes of the heartbeats of all watches."""
    _looking: ClassVar[dict[int, float]] = {}
    """CPU seconds that each thread has spent on checks."""

    def __init__(
        self,
        what: str,
        of: Roots,
        *,
        heartbeat: Callable[[], object] | None = None,
        idle_s: float = IDLE_S,
        whole_s: float = WHOLE_S,
    ) -> None:
        self._what, self._idle_s, self._whole_s = what, idle_s, whole_s
        self._of, self._heartbeat = (of if callable(of) else lambda: of), heartbeat
        self._start = self._moved = self._looked = time.monotonic()
        self._used, self._beat = self._cpu_s(), self._pulse()

    def check(self) -> None:
        """Raises: Stalled without progress for `idle_s`, or if the wait has taken `whole_s`."""
        now = time.monotonic()
        if now - self._looked < self._idle_s / 60:
            return
        gap, self._looked = now - self._looked, now
        used, beat = self._cpu_s(), self._pulse()
        Watch.beats += beat != self._beat
        if gap > max(self._idle_s / 2, 1.0):  # this process did not run, so others may not have run either
            self._moved = now
        if used < self._used or used - self._used >= _POLLS * self._idle_s or beat != self._beat:
            self._used, self._beat, self._moved = used, beat, now  # less: a process left the tree
        if now - self._moved >= self._idle_s:
            raise Stalled(f"{self._what}: no progress for {self._idle_s:g} s ({self._account()})")
        if now - self._start >= self._whole_s:
            raise Stalled(f"{self._what}: not done after {self._whole_s:g} s ({self._account()})")

    def _cpu_s(self) -> float:
        roots = self._of().values()
        start, used = time.thread_time(), cpu_seconds(*roots)
        me, now = threading.get_ident(), time.thread_time()
        self._looking[me] = self._looking.get(me, 0.0) + now - start
        if os.getpid() in roots:  # checking and waiting in this process are not progress
            used -= now + sum(spent for thread, spent in self._looking.items() if thread != me)
        return used

    def _pulse(self) -> object:
        return None if self._heartbeat is None else self._heartbeat()

    def _account(self) -> str:
        return ", ".join(f"{name}: {cpu_seconds(pid):.2f} s of CPU time" for name, pid in self._of().items()) or (
            "no process is left"
        )


def wait_until(condition: Callable[[], object], what: str, *, of: Roots | None = None, **limits: Any) -> None:
    """Block until the condition holds. `of`: the processes that work on it, by default this one; `limits`: see `Watch`.

    Raises: Stalled
    """
    watch = Watch(what, {"this process": os.getpid()} if of is None else of, **limits)
    pause = 0.001
    while not condition():
        watch.check()
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def ended(process: subprocess.Popen, what: str, **limits: Any) -> int:
    """Wait for the end of a process; returns its exit code. A stalled process is not ended.

    Raises: Stalled
    """
    wait_until(lambda: process.poll() is not None, what, of={what: process.pid}, **limits)
    return process.returncode


def run_watched(
    command: Sequence[str | os.PathLike],
    *,
    check: bool = False,
    text: bool = True,
    env: Mapping[str, str] | None = None,
    limits: Mapping[str, Any] | None = None,
    **popen: Any,
) -> subprocess.CompletedProcess:
    """`subprocess.run` with captured output; `limits`: see `Watch`. A stalled process is ended with its descendants.

    Raises: Stalled with the stacks of its Python processes and the end of its output; CalledProcessError
    """
    environment = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=text, env=environment, **popen
    )
    out, err = output_of(process, " ".join(map(str, command))[-200:], **(limits or {}))
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def output_of(process: subprocess.Popen, what: str, **limits: Any) -> tuple[Any, Any]:
    """Wait for the end of a process; returns (stdout, stderr). A stalled process is ended with its descendants.

    Raises: Stalled with the end of its output
    """
    watch = Watch(what, {"its processes": process.pid}, **limits)
    try:
        while True:
            try:
                return process.communicate(timeout=LOOK_S)
            except subprocess.TimeoutExpired:
                watch.check()
    except Stalled as stalled:
        end_tree(process.pid)
        try:
            out, err = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:  # a process with another parent still holds the pipes
            raise stalled from None
        raise Stalled(f"{stalled}\n{(out or '')[-2000:]}\n{(err or '')[-8000:]}") from None
    finally:
        if process.poll() is None:
            end_tree(process.pid, stacks=False)
            process.wait()


def end_tree(*roots: int, stacks: bool = True) -> None:
    """End processes and their descendants. With `stacks`, Python processes write their stacks to stderr first."""
    tree = _tree(roots, _processes())
    for pid in tree if stacks else ():
        with suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.kill(pid, signal.SIGABRT)  # handled by faulthandler, which works inside any call
    settle = time.monotonic() + (5.0 if stacks else 0.0)
    while time.monotonic() < settle and any(runs(pid) for pid in tree):
        time.sleep(0.02)
    for pid in tree:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has ended)."""
    with suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] != b"Z"
    return False
