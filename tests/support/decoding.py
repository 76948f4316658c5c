"""Finds the decoding processes of this process."""

import os

from univitar_ds.processes import children, command


def servers() -> list[int]:
    """Ids of the processes that decoding processes are forked from."""
    return [pid for pid in children(os.getpid()) if b"decoding.worker" in command(pid)]


def decoders() -> list[int]:
    return [pid for server in servers() for pid in children(server)]
