"""Runs programs in a separate terminal, and finds all their processes by a variable in the environment."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.progress import marked, wait_until

CLEARED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SET_UP = """
import fcntl, os, signal, sys, termios
os.setsid()
fcntl.ioctl(int(sys.argv[1]), termios.TIOCSCTTY, 0)  # Ctrl-C there is sent to the foreground group, as in a shell
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # the process that started the tests may ignore them
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Program:
    """Runs a command in a pseudo-terminal of the test, with stdout and stderr in a file. A context manager."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        self.log = folder / f"{uuid.uuid4().hex}.log"
        self._mark = f"TEST_PROGRAM={self.log}".encode()
        variables = {key: value for key, value in os.environ.items() if key not in CLEARED}
        variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TEST_PROGRAM": str(self.log), **environment}
        self._keys, screen = pty.openpty()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SET_UP, str(screen), *command],
                stdin=screen, stdout=log, stderr=log, env=variables, pass_fds=(screen,), cwd=folder,
            )  # fmt: skip
        os.close(screen)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._keys)

    def press_ctrl_c(self) -> None:
        os.write(self._keys, b"\x03")

    def said(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def ends(self) -> int:
        """Wait for the end of the command; returns its exit code."""
        self.wait_for(lambda: self.process.poll() is not None, running=False)
        return self.process.returncode

    def wait_for(self, condition: Callable[[], object], *, running: bool = True) -> None:
        def met() -> object:
            found = condition()
            assert found or not running or self.process.poll() is None, f"it has ended: {self.said()[-3000:]}"
            return found

        wait_until(met, f"{self.log}", of=lambda: marked(self._mark.decode()))

    def pids(self, **environment: str) -> list[int]:
        """Running processes of the command that have these variables in their environment."""
        wanted = {self._mark, *(f"{name}={value}".encode() for name, value in environment.items())}
        return [pid for pid, variables in _environments() if wanted <= variables]


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
        with suppress(OSError):  # the process has ended meanwhile
            yield int(folder.name), set((folder / "environ").read_bytes().split(b"\0"))
