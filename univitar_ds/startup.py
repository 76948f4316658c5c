"""Logs the phases of a start, so that no start is silent for more than a few seconds.

A start goes through phases, such as reading the sources or building the model. Most take milliseconds and need no line.
A thread logs the current phase `AFTER_S` after the last report, and again every `AGAIN_S` while the phase lasts.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

AFTER_S = 2.0
"""Seconds without a report after which the current phase is logged."""
AGAIN_S = 30.0
"""Seconds between two reports of the same phase."""
_RANKS = ("RANK", "SLURM_PROCID")
"""Variables with the number of a rank, before and after those of Slurm are adopted."""


class _Startup:
    """The phases of one start, and the thread that reports them."""

    def __init__(self, text: str) -> None:
        self._text, self._since, self._reported = text, time.monotonic(), False
        self._last = self._since
        self._changed, self._ended = threading.Condition(), False
        self._thread = threading.Thread(target=self._report, name="startup", daemon=True)
        self._thread.start()

    def phase(self, text: str) -> None:
        with self._changed:
            self._text, self._since, self._reported = text, time.monotonic(), False
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _report(self) -> None:
        with self._changed:
            while not self._ended:
                if not self._text:
                    self._changed.wait()
                    continue
                now = time.monotonic()
                due = self._last + (AGAIN_S if self._reported else AFTER_S)
                if now < due:
                    self._changed.wait(due - now)
                    continue
                logger.info("%s%s", self._text, f" ({now - self._since:.0f} s so far)" if self._reported else " ...")
                self._last, self._reported = now, True


_current: list[_Startup] = []
"""The start of this process while it lasts."""


@contextmanager
def reported(text: str) -> Iterator[None]:
    """Reports the phases of the body, the first of which is `text`, until `done` is called or the body ends.

    Under a launcher only rank 0 reports, since equal lines of all ranks would hide others. An inner call only begins a
    phase of the outer one.
    """
    if _current or any(os.environ.get(name, "") not in ("", "0") for name in _RANKS):
        phase(text)
        yield
        return
    _current.append(_Startup(text))
    try:
        yield
    finally:
        done()


def phase(text: str) -> None:
    """Begins a phase, such as "building the model". Does nothing if no start is reported.

    Args: text: empty while something else is shown, such as a progress bar: nothing is logged until the next phase."""
    if _current:
        _current[0].phase(text)


def done() -> None:
    """Ends the reports. Does nothing if no start is reported."""
    while _current:
        _current.pop().end()
