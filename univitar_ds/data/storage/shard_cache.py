"""Local copies of remote shards: one sequential download per shard and machine, readable while it runs."""

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
"""A range that begins at most so many bytes after the end of a growing copy is waited for, not requested separately."""
AHEAD = 4
"""Most concurrent downloads up to which `prefetch` starts further ones."""
_BUFFER = 16 * 1024
_POLL_S = 0.01

Fetch = Callable[[Version, int, int], Iterator[memoryview]]
"""Yields bytes [start, end) of an object in pieces; each is valid until the next one. Raises DataError."""


class ShardCache:
    """Opens remote objects as local files. A reader downloads the object unless it is present or being downloaded.

    `patience_s`: it is an error if another process's download of a needed shard makes no progress for so long.
    """

    def __init__(self, folder: Path, limit_bytes: int, fetch: Fetch, patience_s: float) -> None:
        self._folder, self._fetch, self._patience_s = folder, fetch, patience_s
        self._cache_dir = CacheDir(folder, limit_bytes)
        self._mutex = threading.RLock()
        self._downloads: dict[Version, _Download] = {}
        self._failures: dict[Version, Exception] = {}
        self._hints: dict[Version, None] = {}

    def open(self, version: Version) -> BinaryIO:
        """A stream of the object; reads wait for bytes that are not downloaded yet.

        Raises: DataError, also while reading.
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
        """A range of the copy; waits if the download is near it (`NEAR`). None if it is not available locally."""
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
        """Download these too, in this order, up to `AHEAD` at a time. A reader starts its own download at once."""
        with self._mutex:
            self._hints.update({version: None for version in versions if version.size})
            self._follow_hints()

    def wait(self, version: Version, copy: int, position: int) -> int:
        """Block until the copy has the byte at `position`; returns the number of bytes in the copy."""
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
        """Sleep a moment while another process downloads."""
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
        """The download of a shard, started if necessary; None if another process downloads it or it is complete.

        None also if it is not `needed` yet and has no room in the folder.
        Raises: the error that ended the download since the shard was opened.
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
            except BaseException:  # no thread could be started: do not let readers wait for this download
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
        """Start hinted downloads. The reader that opens a shard gets the error of its download."""
        while self._hints and len(self._downloads) < AHEAD:
            version = next(iter(self._hints))
            del self._hints[version]
            if not self._cache_dir.whole(version):
                with suppress(DataError, RuntimeError):  # RuntimeError: no thread can be started
                    self._download(version, needed=False)


class _Download(threading.Thread):
    """Appends to a part until the copy is complete. `files`: the part and its lock, closed at the end."""

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
        """Block until the byte at `position` is downloaded or the download has ended."""
        with self._grown:
            self._grown.wait_for(lambda: self._have > position or self._over)


class _GrowingFile(SeekableStream):
    """A file over a growing copy; its size is that of the complete object."""

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
