"""Prints to stdout and stderr that may have another encoding, be closed, lack a reader or be on a full disk.

A failure to print does not end a run, since results are also written to files.

On a terminal a process can keep one status line below its log lines. The cursor stays at the start of that line, and
the log lines of all processes of the program erase it first, so a line of another process does not continue it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from univitar_ds import startup

logger = logging.getLogger(__name__)

LINES_AFTER_S, LINES_EVERY_S = 3.0, 10.0
"""Seconds until the first line of a progress bar in a file or pipe, and between lines."""

lost: list[OSError] = []
"""Contains the first error of stdout, if any. Nothing is printed after it."""


def prepare_screen() -> None:
    """Makes stdout and stderr escape characters that they cannot encode, and opens them if they were closed.

    The next opened file would get the number of a closed descriptor, and libraries would print into that file.
    """
    lost.clear()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", closefd=False))
        elif hasattr(stream, "reconfigure"):  # streams of notebooks and tests may lack it
            stream.reconfigure(errors="backslashreplace")


def show(text: str) -> None:
    """Prints to stdout and flushes. The first failure is logged and kept in `lost`; later calls do nothing."""
    if lost:
        return
    try:
        print(text, flush=True)
    except OSError as error:
        lost.append(error)
        silence_stdout()
        if not isinstance(error, BrokenPipeError):
            logger.warning("stdout cannot be written (%s); further results are not printed", error.strerror)


def silence_stdout() -> None:
    """Redirects stdout to /dev/null, so that Python's flush at the end of the process reports no error."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # stdout has no descriptor, as in tests
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


ERASE = "\r\x1b[K"
"""Moves the cursor to the start of the line and erases the line."""


def has_terminal() -> bool:
    """Returns whether stderr is a terminal that can erase a line."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (ValueError, AttributeError):  # closed, or a stand-in of a notebook
        return False


def log_to_screen() -> None:
    """Makes this process log to stderr, with lines that do not break the status line.

    Libraries log only warnings and errors, because torch and its ONNX exporter log internal steps as INFO.
    """
    handler = ScreenHandler()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        handlers=[handler],
    )
    ours = logging.getLogger(__name__.partition(".")[0])
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)


class ScreenHandler(logging.StreamHandler):
    """Writes log lines to stderr. On a terminal a line replaces the status line, which is drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        with _status.above(self.stream):
            super().emit(record)


class _BesideStatus:
    """Replaces `sys.stderr` while there is a status line, so that other text, such as a warning, appears above it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with _status.above(self._stream, ends=text.endswith("\n")):
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Status:
    """The status line of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._text, self._stream = "", None
        self._whole = True
        """Whether the last text above the status line ended with a line break."""

    def show(self, text: str) -> None:
        """Shows `text`, cut to the width of the terminal. After the terminal has closed, does nothing."""
        with self._lock:
            if self._stream is None:
                self._stream = sys.stderr
                sys.stderr = _BesideStatus(self._stream)
            self._text = text
            self._draw()

    def end(self) -> None:
        """Leaves the line as it is, so that later text is written below it."""
        with self._lock:
            if self._stream is None:
                return
            self._draw()
            with suppress(OSError, ValueError):
                self._stream.write("\n")
                self._stream.flush()
            if isinstance(sys.stderr, _BesideStatus):  # not if a test or a library has replaced it since
                sys.stderr = self._stream
            self._text, self._stream = "", None

    @contextmanager
    def above(self, stream: TextIO, *, ends: bool = True) -> Iterator[None]:
        """Erases the status line before the body, and draws it again unless the body writes only part of a line."""
        with self._lock:
            if self._whole and has_terminal():
                self._erase(stream)
            try:
                yield
            finally:
                self._whole = ends
                self._draw()

    def _erase(self, stream: TextIO) -> None:
        with suppress(OSError, ValueError):
            stream.write(ERASE)
            stream.flush()

    def _draw(self) -> None:
        if self._stream is None or not self._text or not self._whole:
            return
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            width = 80
        with suppress(OSError, ValueError):
            self._stream.write(f"{ERASE}{self._text[: width - 1]}\r")
            self._stream.flush()


_status = _Status()


def show_status(text: str) -> None:
    """Shows a line below the log lines of this process, in place of the previous one.

    Must be called only if `has_terminal()`. Does nothing after the terminal has closed.
    """
    _status.show(text)


def end_status() -> None:
    """Ends the status line: its last state stays, and later lines are written below it. May be called again."""
    _status.end()


def progress_bar(*, desc: str, unit: str, disable: bool = False, **settings: Any) -> Any:
    """Returns tqdm's progress bar, a context manager with `update`. In a file or pipe it logs lines instead.

    Args: disable: shows nothing; settings: total, initial and unit_scale of tqdm.
    """
    from tqdm import tqdm

    if not disable:
        startup.phase("")
    given = {"desc": desc, "unit": unit, "disable": disable, **settings}
    if disable or has_terminal():
        return tqdm(**given)

    class Lines(tqdm):
        """A progress bar that logs its state: after `LINES_AFTER_S`, then every `LINES_EVERY_S`, and at the end."""

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            logger.info("%s", _state_of(self.format_dict))
            return True

        def close(self) -> None:
            shown = not self.disable and self.last_print_t >= self.start_t + self.delay
            self.disable = True
            if shown:
                self.display()

    # Updates are checked one by one, since `miniters` adapts to frequent bars and would skip the interval.
    return Lines(**given, file=io.StringIO(), delay=LINES_AFTER_S, mininterval=LINES_EVERY_S, miniters=1)


def _state_of(bar: Mapping[str, Any]) -> str:
    """Returns the state of a bar as text. Args: bar: `format_dict` of tqdm."""
    from tqdm import tqdm

    done, total, seconds = bar["n"], bar["total"], bar["elapsed"]
    unit = "B" if bar["unit"] == "B" else f" {bar['unit']}s"
    count = tqdm.format_sizeof if bar["unit_scale"] else str
    speed = f", {done / seconds:.1f}{unit}/s" if seconds > 0 and not bar["unit_scale"] else ""
    name = bar["prefix"].rstrip(": ")
    if not total:
        return f"{name}: {count(done)}{unit} in {duration(seconds)}{speed}"
    ran = done - bar["initial"]
    eta = f", ETA {duration((total - done) * seconds / ran)}" if ran > 0 and done < total else ""
    return f"{name}: {100 * done / total:.0f} %, {count(done)} of {count(total)}{unit}{eta}{speed}"


def duration(seconds: float) -> str:
    """Returns a duration in the two largest units that it has: "45 s", "3 min 05 s", "2 h 10 min", "4 d 03 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
