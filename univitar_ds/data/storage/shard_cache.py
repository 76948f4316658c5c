"""Remote shards through local copies: one download for each shard and machine, in order, read while it grows."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from univitar_ds.data.storage.cache_dir import CacheDir, Version
from univitar_ds.data.storage.streams import SeekableStream
from univitar_ds.errors import DataError

NEAR = 4 << 20
"""A piece at most so many bytes beyond the end of a growing copy is waited for; one further on is fetched by itself."""
AHEAD = 4
"""Most downloads at once that hints may add to."""
_BUFFER = 16 * 1024
_POLL_S = 0.01

Fetch = Callable[[Version, int, int], Iterator[memoryview]]
"""Bytes [start, end) of an object, in pieces that are valid until the next one. Raises DataError."""


class ShardCache:
    """Objects as files. Any process that reads a shard fetches it, unless it is there or another one does.

    `patience_s`: an error if another process that fetches a shard gets nothing for so long.
    """

    def __init__(self, folder: Path, limit_bytes: int, fetch: Fetch, patience_s: float) -> None:
        self._folder, self._fetch, self._patience_s = folder, fetch, patience_s
        self._cache_dir = CacheDir(folder, limit_bytes)
        self._mutex = threading.RLock()
        self._downloads: dict[Version, _Download] = {}
        self._failures: dict[Version, Exception] = {}
        self._hints: dict[Version, None] = {}

    def open(self, version: Version) -> BinaryIO:
        """A stream of the object that waits for what has not come yet.

        Raises: DataError, also while reading.
        """
        if not version.size:
            return io.BytesIO()
        self._failures.pop(version, None)  # who comes anew tries anew
        deadline = time.monotonic() + self._patience_s
        while True:
            copy = self._opened(version)
            if copy is not None:
                self._cache_dir.used(copy)
                return io.BufferedReader(_GrowingFile(self, version, copy), _BUFFER)
            if self._download(version) is None:
                self._expect(version, deadline)

    def read(self, version: Version, offset: int, length: int) -> bytes | None:
        """A piece, waited for if it is about to come; None if it is not here."""
        copy = self._opened(version)
        if copy is None:
            return None
        try:
            have = os.fstat(copy).st_size
            end = offset + length
            if have < end:
                if version not in self._downloads or offset > have + NEAR:
                    return None
                self.wait(version, copy, end - 1)
            found = os.pread(copy, length, offset)
            return found if len(found) == length else None
        except OSError as error:
            raise self._cache_dir.failed(error) from error
        finally:
            os.close(copy)

    def prefetch(self, versions: Sequence[Version]) -> None:
        """Fetch these too, in this order, a few at a time; a reader need not wait for its turn."""
        with self._mutex:
            self._hints.update({version: None for version in versions if version.size})
            self._follow_hints()

    def wait(self, version: Version, copy: int, position: int) -> int:
        """Until the byte at `position` is in the copy; returns how many there are."""
        have = os.fstat(copy).st_size
        deadline = time.monotonic() + self._patience_s
        while have <= position:
            download = self._download(version)
            if download is None:
                self._expect(version, deadline)
            else:
                download.wait(position)
            state = os.fstat(copy)
            if not state.st_nlink:
                raise DataError(
                    f"{version.url}: its local copy in {self._folder} was removed by somebody while it was read; resume"
                )
            if state.st_size > have:
                deadline = time.monotonic() + self._patience_s
            have = state.st_size
        return have

    def _expect(self, version: Version, deadline: float) -> None:
        """A moment for the process that is fetching."""
        if time.monotonic() > deadline:
            raise DataError(
                f"{version.url}: the process that fetches it into {self._folder} got nothing for "
                f"{self._patience_s:.0f} s; stop that process, or give this run another data.cache.folder"
            )
        time.sleep(_POLL_S)

    def _opened(self, version: Version) -> int | None:
        try:
            return self._cache_dir.open(version)
        except OSError as error:
            raise self._cache_dir.failed(error) from error

    def _download(self, version: Version, *, needed: bool = True) -> _Download | None:
        """The download of a shard, started if need be; None if another process is at it or it is done.

        None also if it is not `needed` yet and has no room in the folder.
        Raises: the error that has ended it since the shard was opened.
        """
        with self._mutex:
            running = self._downloads.get(version)
            if running is not None:
                return running
            if version in self._failures:
                raise self._failures[version]
            try:
                files = self._cache_dir.begin(version, needed=needed)
            except OSError as error:
                raise self._cache_dir.failed(error) from error
            if files is None:
                return None
            try:
                started = _Download(version, files, self._cache_dir, self._fetch, self._ended)
                started.start()
            except BaseException:  # no more threads, as while the process ends: no reader may wait for this one
                for file in files:
                    os.close(file)
                raise
            self._downloads[version] = started
            return started

    def _ended(self, version: Version, error: Exception | None) -> None:
        with self._mutex:
            self._downloads.pop(version, None)
            if error is not None:
                self._failures[version] = error
            self._follow_hints()

    def _follow_hints(self) -> None:
        """Start what was hinted at; a failure is raised for the reader that opens the shard."""
        while self._hints and len(self._downloads) < AHEAD:
            version = next(iter(self._hints))
            del self._hints[version]
            if not self._cache_dir.whole(version):
                with suppress(DataError, RuntimeError):  # the latter where no thread can be started any more
                    self._download(version, needed=False)


class _Download(threading.Thread):
    """Appends to a part until the copy is whole. `files`: the part and its lock, closed at the end."""

    def __init__(
        self,
        version: Version,
        files: tuple[int, int],
        copies: CacheDir,
        fetch: Fetch,
        ended: Callable[[Version, Exception | None], None],
    ) -> None:
        super().__init__(name=f"fetch {version.url}", daemon=True)
        self._version, self._files, self._cache_dir, self._fetch, self._ended = version, files, copies, fetch, ended
        self._grown = threading.Condition()
        self._have = os.fstat(files[0]).st_size
        self._error: Exception | None = None
        self._over = False

    def run(self) -> None:
        part, lock = self._files
        try:
            for piece in self._fetch(self._version, self._have, self._version.size):
                written = 0
                while written < len(piece):
                    written += os.write(part, piece[written:])
                with self._grown:
                    self._have += written
                    self._grown.notify_all()
            self._cache_dir.finish(self._version)
        except OSError as error:
            self._error = self._cache_dir.failed(error)
        except Exception as error:
            self._error = error
        finally:
            os.close(part)
            os.close(lock)
            try:
                self._ended(self._version, self._error)
            finally:  # whatever the next downloads meet, those who wait for this one are woken
                with self._grown:
                    self._over = True
                    self._grown.notify_all()

    def wait(self, position: int) -> None:
        """Until the byte at `position` is there or nothing more comes."""
        with self._grown:
            self._grown.wait_for(lambda: self._have > position or self._over)


class _GrowingFile(SeekableStream):
    """A copy as a file that is as long as the object from the start."""

    def __init__(self, shard_cache: ShardCache, version: Version, copy: int) -> None:
        super().__init__(version.size)
        self._shard_cache, self._version, self._copy = shard_cache, version, copy

    def readinto(self, buffer: memoryview) -> int:
        if self.position >= self.size:
            return 0
        have = self._shard_cache.wait(self._version, self._copy, self.position)
        n = os.preadv(self._copy, [memoryview(buffer)[: have - self.position]], self.position)
        self.position += n
        return n

    def close(self) -> None:
        if not self.closed:
            os.close(self._copy)
        super().close()
