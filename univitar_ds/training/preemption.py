"""Being told to leave: SIGTERM or SIGUSR1 from Slurm, a launcher or a person.

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
from collections.abc import Iterator

SAVED = 85
"""Exit code of a run that was told to leave and has saved: start it again and it goes on. No other end has it."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ECHO_S = 1.0
"""Seconds in which signals after the first one count as the same wish: Slurm, launchers and `timeout` tell a process
directly and through its group or its parent."""


class Stop:
    """Whether this process was told to leave, and what it does about that."""

    def __init__(self) -> None:
        self.requested = False
        self._deferred = False
        self._since = 0.0

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal only sets `requested`; whoever is inside looks at it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def tell(self, number: int) -> None:
        """What a signal does."""
        now = time.monotonic()
        if self.requested and now - self._since < ECHO_S:
            return
        if self.requested or not self._deferred:
            # os.write takes no lock: the main thread may hold that of stderr for as long as it hangs.
            os.write(2, f"{signal.Signals(number).name}: leaving at once, the last checkpoint stays\n".encode())
            os._exit(128 + number)
        self._since = now
        self.requested = True


NEVER = Stop()
"""For a process that listens to no signals."""


def listen() -> Stop:
    """From now on SIGTERM and SIGUSR1 tell the `Stop` that is returned. For the main thread.

    A thread acts on them and not the handler: Python runs handlers in the main thread between two lines of Python,
    which never comes while a collective operation waits for a rank that is gone.
    """
    stop = Stop()
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _nothing)
    threading.Thread(target=_hear, args=(read, stop), name="signals", daemon=True).start()
    return stop


def ignore() -> None:
    """From now on both signals do nothing: this process is on its way out, with the exit code that it has."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _nothing(number: int, frame: object) -> None:
    """A signal with a handler of Python's reaches the pipe, and does not end the process."""


def _hear(read: int, stop: Stop) -> None:
    while numbers := os.read(read, 64):
        for number in numbers:
            if number in SIGNALS:
                stop.tell(number)
