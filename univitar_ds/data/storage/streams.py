"""Seekable streams of remote files.

`RangeReader` sends a range request per read and caches nothing, for callers that skip most of a file. The streams of
`shard_cache` read a local copy, complete or growing, that one request downloads, for callers that read the whole file
sequentially.
"""

from __future__ import annotations

import io

from univitar_ds.data.storage.base import Storage

PIECE = 512 << 10
"""Bytes of one range request: a few images, or a small part of a video, most of which is skipped."""


class SeekableStream(io.RawIOBase):
    """A stream of `size` bytes. Subclasses define `readinto`, which reads at `position` and advances it."""

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
    """A stream that sends a range request per `readinto`. Use it through `buffered`. `fetched`: bytes read so far.

    Raises: DataError while reading, as `Storage.read_range` does.
    """

    def __init__(self, storage: Storage, path: str, size: int) -> None:
        super().__init__(size)
        self.fetched = 0
        self._storage, self._path = storage, path

    def buffered(self) -> io.BufferedReader:
        """Returns a stream that reads `PIECE` bytes at a time. Closing it also closes this stream."""
        return io.BufferedReader(self, PIECE)

    def readinto(self, buffer: memoryview) -> int:
        n = max(0, min(len(buffer), self.size - self.position))
        buffer[:n] = self._storage.read_range(self._path, self.position, n) if n else b""
        self.position += n
        self.fetched += n
        return n
