"""Logs that outlast a storage which fails for a moment: what cannot be written is kept, and written with what follows.

An error that passes by itself, such as an I/O error or a stale handle of a network disk (`UserError.transient`), does
not end a run of days because of a line of a log. Any other error, such as a full disk, is raised.
"""

from __future__ import annotations

import logging
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.errors import StorageError, UserError, writing

logger = logging.getLogger(__name__)

MOST_BYTES = 32 << 20
"""Bytes of a log that are kept in memory while it cannot be written. Older entries are lost, and counted."""
CLOSING_S, PAUSE_S = 5.0, 0.5
"""Seconds for which `close` tries to write what is kept, and seconds between two attempts. Launchers kill a process
30 s after SIGTERM."""
TAIL = 1 << 16
"""Bytes at the end of a file in which the end of its last line is searched, at first."""


class KeptLog(ABC):
    """A log at `path` whose storage may fail for a moment.

    Args: what: the entries in messages, such as "lines"; check: called before each attempt to write. Raises an error if
        this launch must not write, or cannot know it.
    """

    def __init__(self, path: Path, what: str, check: Callable[[], None]) -> None:
        self.path = path
        self._what, self._check = what, check
        self._kept: deque[tuple[Any, int]] = deque()
        """Entries that are not written yet, and their bytes."""
        self._bytes, self._lost, self._failing = 0, 0, False

    @abstractmethod
    def _put(self, entries: list[Any]) -> None:
        """Writes the entries, so that a reader sees them. Raises: OSError; none of them counts as written then."""

    def _add(self, entry: Any, size: int) -> None:
        """Writes an entry after those that are kept. Args: size: its bytes. Raises: as `flush`."""
        self._kept.append((entry, size))
        self._bytes += size
        while self._bytes > MOST_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popleft()[1]
            self._lost += 1
        self.flush()

    def flush(self) -> None:
        """Tries to write what is kept. Raises: StorageError if that fails with an error that does not pass by itself;
        what `check` raises."""
        if not self._kept:
            return
        try:
            with writing(self.path):
                self._check()
                self._put([entry for entry, _ in self._kept])
        except UserError as error:
            if not error.transient:
                raise
            self._note(error)
            return
        count = len(self._kept)
        self._kept.clear()
        self._bytes = 0
        if self._failing:
            self._recovered(count)

    def close(self) -> None:
        """Writes what is kept. Raises: StorageError if the storage does not work again within CLOSING_S."""
        deadline = time.monotonic() + CLOSING_S
        self.flush()
        while self._kept and time.monotonic() < deadline:
            time.sleep(PAUSE_S)
            self.flush()
        if self._kept:
            missing, self._kept = len(self._kept) + self._lost, deque()
            raise StorageError(
                f"{self.path} could not be written until the end of the run: its last {missing:,} {self._what} are "
                "missing; check the disk and its connection"
            )

    def _note(self, error: UserError) -> None:
        if not self._failing:
            logger.warning(
                "%s; the run continues, and the %s are kept (at most %.0f MB) until this file can be written again",
                error,
                self._what,
                MOST_BYTES / 1e6,
            )
        self._failing = True

    def _recovered(self, count: int) -> None:
        lost, self._lost, self._failing = self._lost, 0, False
        if lost:
            logger.warning(
                "%s is written again: its last %s %s had been kept, %s older ones are lost (limit: %.0f MB)",
                self.path,
                f"{count:,}",
                self._what,
                f"{lost:,}",
                MOST_BYTES / 1e6,
            )
        else:
            logger.info("%s is written again, with the %s %s that had been kept", self.path, f"{count:,}", self._what)


class JsonLines(KeptLog):
    """A file of JSON lines to which whole lines are appended. Raises: OSError if it cannot be opened."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        super().__init__(path, "lines", check)
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size

    def append(self, line: str) -> None:
        """Appends a line, given without its end. Raises: as `flush`."""
        text = line.encode() + b"\n"
        self._add(text, len(text))

    def close(self) -> None:
        try:
            super().close()
        finally:
            file, self._file = self._file, None
            if file is not None:
                os.close(file)

    def _put(self, entries: list[bytes]) -> None:
        text = memoryview(b"".join(entries))
        if self._file is None:
            self._file = self._opened_again()
        try:
            written = 0
            while written < len(text):
                written += os.write(self._file, text[written:])
        except OSError:
            file, self._file = self._file, None
            with suppress(OSError):  # a part of a line may have been written; `_opened_again` removes it otherwise
                os.ftruncate(file, self._end)
            with suppress(OSError):
                os.close(file)
            raise
        self._end += len(text)

    def _opened_again(self) -> int:
        """Opens the file, and removes what follows the last line that was written whole."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            end = self._end if size >= self._end else _end_of_lines(file, size)
            os.ftruncate(file, end)
        except OSError:
            os.close(file)
            raise
        if end < self._end:
            logger.warning(
                "%s lacks %s bytes at its end, which the storage had accepted before it failed",
                self.path,
                f"{self._end - end:,}",
            )
        self._end = end
        return file


def _end_of_lines(file: int, size: int) -> int:
    """Returns the number of bytes up to the end of the last whole line of a file of `size` bytes."""
    block = TAIL
    while True:
        start = max(0, size - block)
        found = os.pread(file, size - start, start).rfind(b"\n")
        if found >= 0 or start == 0:
            return start + found + 1
        block *= 2
