"""Local copies of remote shards: one sequential download per shard and machine, readable before it is complete."""

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
"""`read` waits for a range that begins at most this many bytes after the end of a growing copy."""
AHEAD = 4
"""Number of concurrent downloads up to which `prefetch` starts more."""
_BUFFER = 16 * 1024
_POLL_S = 0.01

Fetch = Callable[[Version, int, int], Iterator[memoryview]]
"""Yields bytes [start, end) of an object in pieces, each valid until the next is requested. Raises: DataError."""


class ShardCache:
    """A cache of remote objects as local files. A reader downloads an object that is neither present nor in progress.

    `patience_s`: maximum seconds without progress while another process downloads a needed shard.
    """

    def __init__(self, folder: Path, limit_bytes: int, fetch: Fetch, patience_s: float) -> None:
        self._folder, self._fetch, self._patience_s = folder, fetch, patience_s
        self._cache_dir = CacheDir(folder, limit_bytes)
        self._mutex = threading.RLock()
        self._downloads: dict[Version, _Download] = {}
        self._failures: dict[Version, Exception] = {}
        self._hints: dict[Version, None] = {}

    def open(self, version: Version) -> BinaryIO:
        """Returns a stream of the object, whose reads wait for bytes that are not downloaded yet.

        Raises: DataError if the download fails, here or while reading.
        """
        if not version.size:
            return io.BytesIO()
        self._failures.pop(version, None)  # a new reader tries again
        deadline = time.monotonic() + self._patience_s
        while True:
            copy = self._opened(version)
            if copy is not None:
                self._cache_dir.used(copy)
                return io.BufferedReader(_GrowingFile(self, version, copy), _BUFFER)
            if self._download(version) is None:
                self._expect(version, deadline)

    def read(self, version: Version, offset: int, length: int) -> bytes | None:
        """Returns a range of the local copy, and waits for a download that is near (`NEAR`); None if not available."""
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
        """Downloads these objects in order, up to `AHEAD` at a time. `open` does not wait for a free download."""
        with self._mutex:
            self._hints.update({version: None for version in versions if version.size})
            self._follow_hints()

    def wait(self, version: Version, copy: int, position: int) -> int:
        """Blocks until the copy has the byte at `position`. Returns the number of bytes in the copy.

        Raises: DataError if the download fails, makes no progress, or the copy is removed.
        """
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
                    f"{version.url}: its local copy in {self._folder} was removed while it was read; resume the run"
                )
            if state.st_size > have:
                deadline = time.monotonic() + self._patience_s
            have = state.st_size
        return have

    def _expect(self, version: Version, deadline: float) -> None:
        """Sleeps for `_POLL_S` while another process downloads. Raises: DataError after `deadline`."""
        if time.monotonic() > deadline:
            raise DataError(
                f"{version.url}: the process that downloads it into {self._folder} received nothing for "
                f"{self._patience_s:.0f} s; stop that process, or set another data.cache.folder for this run"
            )
        time.sleep(_POLL_S)

    def _opened(self, version: Version) -> int | None:
        try:
            return self._cache_dir.open(version)
        except OSError as error:
            raise self._cache_dir.failed(error) from error

    def _download(self, version: Version, *, needed: bool = True) -> _Download | None:
        """Returns the download of a shard, started if necessary.

        None if another process downloads the shard, if it is complete, or if it is not `needed` and the folder is full.
        Raises: the error that ended an earlier download since the shard was opened.
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
            except BaseException:  # no thread could be started: readers must not wait for this download
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
        """Starts hinted downloads. Their errors are raised only when a reader opens the shard."""
        while self._hints and len(self._downloads) < AHEAD:
            version = next(iter(self._hints))
            del self._hints[version]
            if not self._cache_dir.whole(version):
                with suppress(DataError, RuntimeError):  # RuntimeError: no thread can be started
                    self._download(version, needed=False)


class _Download(threading.Thread):
    """A thread that downloads into a partial copy. `files`: the partial copy and its lock, closed at the end."""

    def __init__(
        self,
        version: Version,
        files: tuple[int, int],
        cache_dir: CacheDir,
        fetch: Fetch,
        ended: Callable[[Version, Exception | None], None],
    ) -> None:
        super().__init__(name=f"fetch {version.url}", daemon=True)
        self._version, self._files, self._cache_dir, self._fetch, self._ended = version, files, cache_dir, fetch, ended
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
            finally:  # wake waiting readers even if starting the next downloads fails
                with self._grown:
                    self._over = True
                    self._grown.notify_all()

    def wait(self, position: int) -> None:
        """Blocks until the byte at `position` is downloaded or the download has ended."""
        with self._grown:
            self._grown.wait_for(lambda: self._have > position or self._over)


class _GrowingFile(SeekableStream):
    """A stream of a growing copy; `size` is the size of the complete object."""

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
