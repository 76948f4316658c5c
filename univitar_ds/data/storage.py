"""Bytes of files by address. Everything that reads shards goes through this one interface.

Only this module knows what kind of place a path points to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from univitar_ds.errors import DataError

SCHEMES = "a local path"


class Storage(Protocol):
    """Read-only access to files. Every failure is a DataError that names the file."""

    def open(self, path: str) -> BinaryIO:
        """A readable and seekable stream from the first byte on."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""

    def size(self, path: str) -> int:
        """Size in bytes."""

    def list(self, prefix: str) -> Sequence[str]:
        """Paths of the files directly in the folder `prefix`, sorted by name."""


class LocalStorage:
    """Files of this machine or of a mounted file system."""

    def open(self, path: str) -> BinaryIO:
        try:
            return open(path, "rb")
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0, (offset, length)
        try:
            with open(path, "rb", buffering=0) as file:
                return _exactly(file, path, offset, length)
        except OSError as error:
            raise _unreadable(path, error) from error

    def size(self, path: str) -> int:
        try:
            return os.stat(path).st_size
        except OSError as error:
            raise _unreadable(path, error) from error

    def list(self, prefix: str) -> Sequence[str]:
        try:
            return sorted(str(entry) for entry in Path(prefix).iterdir() if entry.is_file())
        except OSError as error:
            raise _unreadable(prefix, error) from error


def storage_for(url: str) -> Storage:
    """The storage that serves `url`; its methods take the same url.

    Raises: DataError for a scheme that nothing here reads.
    """
    scheme, separator, _ = url.partition("://")
    if separator:
        raise DataError(f"{url}: cannot read from {scheme}://; a source must be {SCHEMES}")
    return LocalStorage()


def _exactly(file: BinaryIO, path: str, offset: int, length: int) -> bytes:
    """One read may return less than asked for; the end of the file before `length` bytes is an error."""
    parts = []
    missing = length
    while missing:
        part = os.pread(file.fileno(), missing, offset + length - missing)
        if not part:
            raise DataError(
                f"{path}: ends at byte {offset + length - missing}, but {length} bytes were expected from byte "
                f"{offset} on; the file was cut or replaced while it was in use: restore it or pack it again"
            )
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the path and its permissions")
