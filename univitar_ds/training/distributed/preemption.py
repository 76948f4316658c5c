"""Being asked to leave: Ctrl-C, SIGTERM or SIGUSR1 from Slurm, a launcher or a person, or a terminal that closes.

While a run trains, the first signal is only noted. The ranks exchange their notes once per step, so all of them end
after the same step, save, and exit with `SAVED`. At any other time, and at a second signal, the process leaves at
once, with the code that the signal would have given without us; a checkpoint appears by one rename, so that harms
nothing.
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

SAVED = 85
"""Exit code of a run that was asked to leave and has saved: start it again and it continues. No other end has it."""
_LEFT_ALONE_WHERE_IGNORED = (signal.SIGINT, signal.SIGHUP)
"""A shell has processes in the background ignore Ctrl-C, and `nohup` the end of the terminal."""
ECHO_S = 1.0
"""Seconds in which signals after the first one count as the same wish: Slurm, launchers and `timeout` signal a process
directly and through its group or its parent."""
KEY_ECHO_S = 0.3
"""The same for SIGINT after SIGINT: keys that follow each other so quickly mean one."""


class Stop:
    """Whether this process was asked to leave, and what it does about that."""

    def __init__(self, first: Callable[[], None] | None = None, leaving: Callable[[], None] | None = None) -> None:
        """Args: first, what to do at a first signal, which then is always noted; leaving, before the process exits."""
        self.requested = False
        self.number = 0
        """Of the first signal; 0 without one."""
        self.leaves = False
        """Whether the process ends now, whatever other threads find."""
        self.quiet = os.environ.get("RANK", "0") != "0"  # one rank is enough to say what all do
        self._first, self._leaving = first, leaving
        self._deferred = first is not None
        self._since = 0.0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only sets `requested`, and the code inside looks at it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def tell(self, number: int) -> None:
        """What a signal does."""
        now = time.monotonic()
        if self.requested and number == signal.SIGHUP:  # a user who pressed Ctrl-C may close the terminal then
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
        """Does not return: ends the process at once, as the signal would have without us."""
        self.leaves = True
        if self._leaving is not None:
            self._leaving()
        if not self.quiet:
            say(f"{signal.Signals(number).name}: leaving at once, the last checkpoint stays")
        release_all()
        os._exit(128 + number)


NEVER = Stop()
"""For a process that listens to no signals."""


def listen(stop: Stop | None = None) -> Stop:
    """From now on `SIGNALS` reach `stop`, by default a new one; returns it. For the main thread.

    A thread acts on them and not the handler: Python runs handlers in the main thread between two lines of Python,
    which never comes while a collective operation waits for a rank that is gone.
    """
    stop = stop or Stop()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _heard():
        signal.signal(number, _nothing)
    threading.Thread(target=_hear, args=(read, stop), name="signals", daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a parent that used `signals_held` handed its mask down
    return stop


def ignore() -> None:
    """From now on all of them do nothing: this process is on its way out, with the exit code that it has."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def say(sentence: str) -> None:
    """A line on stderr, from any thread and wherever the others are.

    os.write takes no lock: the main thread may hold that of stderr for as long as it hangs.
    """
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(2, f"{sentence}\n".encode())


def _heard() -> list[signal.Signals]:
    return [
        number
        for number in SIGNALS
        if number not in _LEFT_ALONE_WHERE_IGNORED or signal.getsignal(number) != signal.SIG_IGN
    ]


def _nothing(number: int, frame: object) -> None:
    """A signal with a handler of Python's reaches the pipe, and does not end the process."""


def _hear(read: int, stop: Stop) -> None:
    while numbers := os.read(read, 64):
        for number in numbers:
            if number in SIGNALS:
                stop.tell(number)
