"""Reads files of this machine or of a mounted file system."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Self

from univitar_ds.errors import DataError, SampleError
from univitar_ds.regular_files import check_regular, open_regular

KEPT_OPEN = 32
_FILES_OF_OTHERS = 512
"""Number of open files, sockets and pipes reserved for the rest of the process."""


class LocalStorage:
    """The `Storage` for files of this machine or of a mounted file system."""

    def open(self, path: str) -> BinaryIO:
        try:
            return open_regular(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0, (offset, length)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # takes half the time of a file object
            try:
                return _exactly(file, path, offset, length)
            finally:
                os.close(file)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, path: str) -> bytes:
        try:
            with open_regular(path) as stream:
                return stream.read()
        except OSError as error:
            raise _unreadable(path, error) from error

    def size(self, path: str) -> int:
        try:
            state = os.stat(path)
            check_regular(path, state)
            return state.st_size
        except OSError as error:
            raise _unreadable(path, error) from error

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def list(self, prefix: str) -> Sequence[str]:
        try:
            with os.scandir(prefix) as entries:  # returns file types without a stat call per file
                return sorted([str(Path(prefix, entry.name)) for entry in entries if entry.is_file()])
        except OSError as error:
            raise _unreadable(prefix, error) from error

    def folders(self, prefix: str) -> Sequence[str]:
        try:
            with os.scandir(prefix) as entries:
                return sorted([str(Path(prefix, entry.name)) for entry in entries if entry.is_dir()])
        except OSError as error:
            raise _unreadable(prefix, error) from error

    def prefetch(self, paths: Sequence[str]) -> None:
        """Does nothing: the operating system reads ahead."""


class OpenFiles(LocalStorage):
    """A `LocalStorage` that reads several ranges of a file with one opening. A context manager; not thread-safe.

    At most `KEPT_OPEN` files are open at a time. Use it briefly: if a file is replaced, the old content is read.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0, (offset, length)
        try:
            file = self._files.get(path)
            if file is None:
                if len(self._files) == KEPT_OPEN:
                    self._close()
                file = self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return _exactly(file, path, offset, length)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def allow_open_files(count: int) -> None:
    """Raises this process's limit of open files by `count`, up to the hard limit; the usual default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(os.listdir("/proc/self/fd")) + _FILES_OF_OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_file(path: Path, max_bytes: int, limit: str) -> bytes:
    """Returns the content of a regular file.

    Args: max_bytes: maximum size; limit: end of the message if the file is larger.
    Raises: SampleError if the file is larger or cannot be read.
    """
    try:
        with open_regular(path) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length > max_bytes:
                raise SampleError("too_large", f"the file has {length} bytes{limit}")
            return stream.read()
    except OSError as error:
        raise SampleError("unreadable", f"the file cannot be read: {error.strerror}") from error


def _exactly(file: int, path: str, offset: int, length: int) -> bytes:
    """Reads exactly `length` bytes, with several calls of `pread` if needed. Raises: DataError if the file ends."""
    parts = []
    missing = length
    while missing:
        part = os.pread(file, missing, offset + length - missing)
        if not part:
            raise DataError(
                f"{path}: ends at byte {offset + length - missing}, but {length} bytes were expected from byte "
                f"{offset} on; the file was truncated or replaced while it was in use: restore it or pack it again"
            )
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: str, error: OSError) -> DataError:
    if error.errno == errno.EMFILE:
        remedy = "every lane keeps a shard of each source open: raise the limit (ulimit -n) or give fewer sources"
    else:
        remedy = "check the path and its permissions"
    return DataError(f"{path}: cannot be read ({error.strerror or error}); {remedy}")
