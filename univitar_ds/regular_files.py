"""Opens files only if they are regular, because reading a named pipe or a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from univitar_ds.errors import CheckpointError

_OTHER = "is not a regular file"


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a local file for reading. Raises: OSError, also for pipes and devices."""
    return open(path, "rb", opener=_regular)


def read_bytes(path: Path) -> bytes:
    """Returns the content of a file. Raises: OSError, also for pipes and devices."""
    with open_regular(path) as stream:
        return stream.read()


def read_utf8(path: Path) -> str:
    """Returns the text of a file. Raises: as `read_bytes`; UnicodeDecodeError if it is not UTF-8."""
    return read_bytes(path).decode("utf-8")


def is_regular(path: Path) -> bool:
    """Whether `path`, an optional file of a model or run, exists and is a regular file.

    Raises: CheckpointError for a pipe or device. Ignoring it as absent would silently give another result.
    """
    try:
        state = os.stat(path)
        check_regular(path, state)
    except OSError as error:
        if error.errno == errno.EINVAL and error.strerror == _OTHER:
            raise CheckpointError(f"{path} is a pipe or a device; put a file in its place, or remove it") from error
        return False
    return stat.S_ISREG(state.st_mode)


def check_regular(path: str | Path, state: os.stat_result) -> None:
    """Raises OSError for pipes and devices. Accepts folders, since the system's error for reading a folder is clear."""
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise OSError(errno.EINVAL, _OTHER, str(path))


def _regular(path: str | Path, flags: int) -> int:
    file = os.open(path, flags | os.O_NONBLOCK)  # otherwise opening a pipe waits for a writer
    try:
        check_regular(path, os.fstat(file))
    except OSError:
        os.close(file)
        raise
    return file
