"""Remote files as seekable streams.

There are two. `RangeReader` asks the store for each stretch that is read and keeps nothing: for a reader that skips
most of a file. A stream of `shard_cache` reads a local copy, whole or growing, and waits for the bytes that have not
come yet: for a reader that wants all of it, forward, for which one request fetches it.
"""

from __future__ import annotations

import io

from univitar_ds.data.storage.base import Storage

PIECE = 512 << 10
"""Bytes of one range read: a few images, so that little is asked for twice, and a part of a video, most of which is
skipped."""


class SeekableStream(io.RawIOBase):
    """A stream of known size in bytes, read from `position` on. A subclass has `readinto`, which moves it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(base + offset, 0)
        return self.position


class RangeReader(SeekableStream):
    """A file by range reads, one for each `readinto`: read through `buffered`. `fetched`: bytes read so far.

    Raises: DataError while reading, as `Storage.read_range` does.
    """

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        super().__init__(size)
        self.fetched = 0
        self._storage, self._path = storage, path

    def buffered(self) -> io.BufferedReader:
        """A stream that reads `PIECE` bytes at a time; closing it closes this one."""
        return io.BufferedReader(self, PIECE)

    def readinto(self, buffer: memoryview) -> int:
        n = max(0, min(len(buffer), self.size - self.position))
        buffer[:n] = self._storage.read_range(self._path, self.position, n) if n else b""
        self.position += n
        self.fetched += n
        return n
