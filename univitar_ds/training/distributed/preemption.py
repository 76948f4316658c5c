"""Stop requests: Ctrl-C, SIGTERM or SIGUSR1 from Slurm, a launcher or a person, or a terminal that closes.

While a run trains, the first signal only sets a flag. The ranks exchange their flags once per step, so all ranks end
after the same step, save, and exit with `SAVED`. At any other time, and at a second signal, the process exits at once
with the signal's default exit code. No checkpoint is damaged, since a checkpoint appears by one rename.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from univitar_ds.processes import SIGNALS
from univitar_ds.run_lock import release_all
from univitar_ds.screen import ERASE, has_terminal

SAVED = 85
"""Exit code of a run that was asked to stop and has saved, and of no other run. A new launch continues the run."""
_KEPT_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""Signals that stay ignored if they are ignored at launch: a shell makes background processes ignore Ctrl-C, and
`nohup` makes a process ignore the end of the terminal."""
ECHO_S = 1.0
"""Seconds in which signals after the first signal count as the same request: Slurm, launchers and `timeout` signal a
process directly and through its group or its parent."""
KEY_ECHO_S = 0.3
"""Seconds in which a SIGINT after a SIGINT counts as the same request."""


class Stop:
    """Whether this process was asked to stop, and its response to signals."""

    def __init__(
        self,
        first: Callable[[], None] | None = None,
        leaving: Callable[[], None] | None = None,
        resume: str | None = None,
    ) -> None:
        """Args: first: called at the first signal; with it, the first signal never ends the process. leaving: called
        before the process exits; resume: the command that continues the run, for messages."""
        self.requested = False
        self.number = 0
        """Number of the first signal; 0 without a signal."""
        self.leaves = False
        """Whether the process is ending; errors of other threads are then ignored."""
        self.quiet = os.environ.get("RANK", "0") != "0"  # one rank reports for all
        self.remedy = "" if resume is None else f"; continue the run with {resume}"
        """The end of a message."""
        self._first, self._leaving = first, leaving
        self._deferred = first is not None
        self._since = 0.0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this context the first signal only sets `requested`, which the body checks."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def receive(self, number: int) -> None:
        """Responds to a signal."""
        now = time.monotonic()
        if self.requested and number == signal.SIGHUP:  # after Ctrl-C a user may close the terminal
            return
        if self.requested and now - self._since < (KEY_ECHO_S if number == self.number == signal.SIGINT else ECHO_S):
            return
        if self.requested or not self._deferred:
            self.leave(number)
        self._since, self.number = now, number
        self.requested = True
        if self._first is not None:
            self._first()

    def leave(self, number: int) -> None:
        """Ends the process at once with the signal's default exit code; does not return."""
        self.leaves = True
        if self._leaving is not None:
            self._leaving()
        if not self.quiet:
            say(f"{signal.Signals(number).name}: exiting immediately, the last checkpoint stays{self.remedy}")
        release_all()
        os._exit(128 + number)


NEVER = Stop()
"""The `Stop` of a process that handles no signals."""


def listen(stop: Stop | None = None) -> Stop:
    """Passes `SIGNALS` to `stop` (default: a new `Stop`) from now on, and returns `stop`. Called in the main thread.

    A thread responds to signals instead of a handler: Python runs handlers in the main thread between two instructions,
    which never happens while a collective waits for a rank that has ended.
    """
    stop = stop or Stop()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _handled_signals():
        signal.signal(number, _no_op)
    threading.Thread(target=_read_signals, args=(read, stop), name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a parent with `signals_held` blocks them
    return stop


def ignore() -> None:
    """Ignores all `SIGNALS` from now on, so that they do not change the exit code of a process that is ending."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say(sentence: str) -> None:
    """Writes a line to stderr, from any thread.

    os.write acquires no lock: the main thread may hold the lock of stderr while it hangs.
    """
    with contextlib.suppress(OSError):  # the terminal is closed
        erase = ERASE if has_terminal() else ""
        os.write(2, f"{erase}{sentence}\n".encode())


def _handled_signals() -> list[signal.Signals]:
    return [number for number in SIGNALS if number not in _KEPT_IGNORED or signal.getsignal(number) != signal.SIG_IGN]


def _no_op(number: int, frame: object) -> None:
    """Does nothing. With this handler Python writes the signal to the pipe, and the process does not end."""


def _read_signals(read: int, stop: Stop) -> None:
    while numbers := os.read(read, 64):
        for number in numbers:
            if number in SIGNALS:
                stop.receive(number)
