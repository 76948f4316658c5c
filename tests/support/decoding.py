"""The processes that decode for this one, as the system lists them."""

import os

from univitar_ds.processes import children, command


def servers() -> list[int]:
    """The processes that decoding processes are forked from."""
    return [pid for pid in children(os.getpid()) if b"decoding.worker" in command(pid)]


def decoders() -> list[int]:
    return [pid for server in servers() for pid in children(server)]
