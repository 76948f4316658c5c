"""Finds the decoding processes of this process, and kills them when they get certain jobs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.support.progress import runs, wait_until
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.processes import children, command


def servers() -> list[int]:
    """Ids of the processes that decoding processes are forked from."""
    return [pid for pid in children(os.getpid()) if b"decoding.worker" in command(pid)]


def decoders() -> list[int]:
    return [pid for server in servers() for pid in children(server)]


def gone(pid: int) -> bool:
    """Waits for the end of a process."""
    wait_until(lambda: not runs(pid), f"the end of process {pid}")
    return True


class KillingServer:
    """A server of decoding processes, each of which is killed when it is sent a message for which `kills` is true."""

    def __init__(self, server: ForkServer, kills: Callable[[bytes], bool]) -> None:
        self._server, self._kills = server, kills

    def fork(self) -> tuple[int, _KillingChannel]:
        pid, channel = self._server.fork()
        return pid, _KillingChannel(pid, channel, self._kills)

    def end(self, pid: int, *, hangs: bool) -> int | None:
        return self._server.end(pid, hangs=hangs)


class _KillingChannel:
    def __init__(self, pid: int, channel: Connection, kills: Callable[[bytes], bool]) -> None:
        self._pid, self._channel, self._kills = pid, channel, kills

    def send_bytes(self, message: bytes) -> None:
        if self._kills(message):
            os.kill(self._pid, signal.SIGKILL)
            gone(self._pid)
        self._channel.send_bytes(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)
