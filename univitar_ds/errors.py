"""Errors that a user can cause. Each message gives the value found, the limit and the remedy.

The command line prints only the message and exits with `exit_code`. Any other exception is a bug in the program and
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

_Given, _Result = ParamSpec("_Given"), TypeVar("_Result")


class UserError(Exception):
    """An error outside the program that the user can correct.

    `transient`: whether the same may succeed later without a change, as after an outage of a storage.
    """

    exit_code = 2
    transient = False


class ConfigError(UserError):
    """An error in a configuration, a command line or a folder that it names."""


class DataError(UserError):
    """An error in a source, shard or sample."""


class SampleError(DataError):
    """An error in one sample. The loader counts such samples and continues as far as `data.on_bad` allows.

    `kind` is one of `univitar_ds.data.sampler.bad_samples.KINDS`, such as "unreadable" (no known media), "corrupt"
    (damaged or truncated), "too_large" (above a limit), "no_video" (a container without images), "wrong_size" (differs
    from the metadata) or "timeout".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.kind, str(self))


class CheckpointError(UserError):
    """An error in a checkpoint or in weights: missing, damaged or of another model."""


class InstallationError(UserError):
    """A library that is missing in this environment or cannot be imported."""


class PluginError(UserError):
    """An error in a plugin, which is code of the user."""


class StorageError(UserError):
    """An error of the storage: a full or read-only disk, a missing permission, an impossible name."""


class RunError(UserError):
    """A run that was started from Python has ended early.

    `exit_code` is its exit status; 85 means that it was asked to stop and has saved a checkpoint.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class SeveralFaults(ConfigError):
    """Several errors of one run. The message lists the message of each; `errors` holds the errors."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        lines = [str(error).replace("\n  - ", "\n    - ") for error in errors]
        super().__init__("\n  - ".join([f"{len(lines)} errors:", *lines]))
        self.errors = tuple(errors)


class Faults:
    """Collects the errors of checks that do not depend on each other, so that all are raised together."""

    def __init__(self) -> None:
        self._errors: list[UserError] = []

    def of(self, check: Callable[_Given, _Result], *given: _Given.args, **options: _Given.kwargs) -> _Result | None:
        """Calls `check(*given, **options)` and returns its result; None if it raised a UserError, which is kept."""
        try:
            return check(*given, **options)
        except UserError as error:
            self._errors += error.errors if isinstance(error, SeveralFaults) else [error]
            return None

    def add(self, error: UserError) -> None:
        self._errors.append(error)

    def __bool__(self) -> bool:
        return bool(self._errors)

    def raise_all(self) -> None:
        """Raises the error that was kept, or a SeveralFaults if there are several. Does nothing without errors."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise SeveralFaults(self._errors) from self._errors[0]


_REMEDIES = {
    errno.ENOSPC: "free some space there, or name another place",
    errno.EDQUOT: "free some of your quota there, or name another place",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "name a place that you may write to, or ask for permission",
    errno.EPERM: "name a place that you may write to, or ask for permission",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of this path is a file; name another place",
    errno.EISDIR: "there is a folder of this name; name another place",
    errno.EEXIST: "there is a file of this name; name another place",
    errno.ELOOP: "a part of this path is a link to itself; name another place",
    errno.EIO: "check the disk and its connection",
    errno.ESTALE: "check the disk and its connection",
    errno.ETIMEDOUT: "check the disk and its connection",
    errno.ENOTCONN: "check the disk and its connection",
    errno.EREMOTEIO: "check the disk and its connection",
    errno.ESHUTDOWN: "check the disk and its connection",
    errno.EHOSTDOWN: "check the disk and its connection",
}
_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.ESHUTDOWN, errno.EHOSTDOWN,
}  # fmt: skip
"""What network file systems return while a server is down or fails over."""


def storage_error(error: OSError, path: object = None, done: str = "used") -> StorageError | None:
    """Returns a StorageError for an error of the storage, `transient` if it may pass; None for other errors.

    Args: path: file or folder in the message if `error` has none; done: the participle in "cannot be ...".
    """
    remedy = _REMEDIES.get(error.errno)
    if error.errno == errno.ENOENT and done == "written":
        remedy = "its folder is gone, or none can be made there; name another place"
    if remedy is None:
        return None
    if done == "read" and error.errno in (errno.EACCES, errno.EPERM):
        remedy = "ask for the permission to read it, or name another place"
    name = path if error.filename is None else os.fsdecode(error.filename)
    if error.errno == errno.ENAMETOOLONG and name is not None:
        name = "/".join(part if len(part) <= 60 else f"{part[:57]}..." for part in str(name).split("/"))
    place = "a file" if name is None else f"{name}"
    sentence = StorageError(f"{place} cannot be {done}: {os.strerror(error.errno)}; {remedy}")
    sentence.transient = error.errno in _TRANSIENT
    return sentence


def shortened(text: str, longest: int = 60) -> str:
    """Returns a text of at most `longest` characters, with dots where something is left out."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(path: object, done: str = "written") -> Iterator[None]:
    """Wraps code that writes `path`. Raises: StorageError instead of an OSError of the storage.

    Args: done: see `storage_error`."""
    try:
        yield
    except OSError as error:
        sentence = storage_error(error, path, done)
        if sentence is None:
            raise
        raise sentence from error
