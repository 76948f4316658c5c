"""The errors a user can cause. Each message says what was found, what is allowed and what to do next.

The command line prints the message alone and exits with `exit_code`; any other exception is a bug in
the program and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program is wrong and its user can correct it."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """A source, shard or sample that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be read. The loader counts it and continues as far as `data.on_bad` allows.

    `kind` is the word under which it is counted, such as "unreadable" (no known media), "corrupt" (damaged or
    cut off), "too_large" (beyond a limit), "no_video" (a container without images), "wrong_size" (unlike its
    metadata), "timeout"; all of them are `univitar_ds.data.sampler.bad_samples.KINDS`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.kind, str(self))


class CheckpointError(UserError):
    """A checkpoint or a set of weights that is damaged or belongs to another model."""


class InstallationError(UserError):
    """A library of this environment that does not work."""


class StorageError(UserError):
    """A file or folder that cannot be written: a full or read-only disk, a missing permission, an impossible name."""


_REMEDIES = {
    errno.ENOSPC: "free some space there, or name another place",
    errno.EDQUOT: "free some of your quota there, or name another place",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name a place that you may write to, or ask for the right to",
    errno.EPERM: "name a place that you may write to, or ask for the right to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; name another place",
    errno.EISDIR: "there is a folder of this name; name another place",
    errno.EEXIST: "there is a file of this name; name another place",
    errno.ELOOP: "a part of this path is a link to itself; name another place",
    errno.EIO: "check the disk and its connection",
    errno.ESTALE: "check the disk and its connection",
}


def storage_error(error: OSError, path: object = None, done: str = "used") -> StorageError | None:
    """A sentence for an error of the storage; None for an error of another kind.

    Args: path: the file or folder, for an error that does not name it; done: the participle in "cannot be ...".
    """
    remedy = _REMEDIES.get(error.errno)
    if error.errno == errno.ENOENT and done == "written":
        remedy = "its folder is gone, or none can be made there; name another place"
    if remedy is None:
        return None
    name = path if error.filename is None else os.fsdecode(error.filename)
    place = "a file" if name is None else f"{name}"
    return StorageError(f"{place} cannot be {done}: {os.strerror(error.errno)}; {remedy}")


@contextmanager
def writing(path: object) -> Iterator[None]:
    """Wraps code that writes `path`. Raises: StorageError for errors of the storage."""
    try:
        yield
    except OSError as error:
        sentence = storage_error(error, path, "written")
        if sentence is None:
            raise
        raise sentence from error
