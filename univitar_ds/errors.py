"""The errors a user can cause. Each message says what was found, what is allowed and what to do next.

The command line prints the message alone and exits with `exit_code`; any other exception is a fault of
the program and keeps its traceback.
"""


class UserError(Exception):
    """Something outside the program is wrong and its user can mend it."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be run."""


class DataError(UserError):
    """A source, shard or sample that cannot be used."""


class SampleError(DataError):
    """One sample that cannot be read. The loader counts it and goes on; see `data.max_bad_in_a_row`."""


class CheckpointError(UserError):
    """A checkpoint or a set of weights that is damaged or belongs to another model."""
