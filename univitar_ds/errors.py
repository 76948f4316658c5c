"""The errors a user can cause. Each message says what was found, what is allowed and what to do next.

The command line prints the message alone and exits with `exit_code`; any other exception is a fault of
the program and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong and its user can mend it."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """A source, shard or sample that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be read. The loader counts it and goes on as far as `data.on_bad` allows.

    `kind` is the one word it is counted under, such as "unreadable" (no media we know), "corrupt" (damaged or
    cut off), "too_large" (beyond a limit), "no_video" (a container without pictures), "timeout"; all of them are
    `data.health.KINDS`.
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
