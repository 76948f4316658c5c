"""The rendezvous of a run's ranks, and the messages of its errors."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from univitar_ds.errors import UserError
from univitar_ds.training.distributed.launchers import RANK_NAMES, left_behind
from univitar_ds.training.distributed.slurm import node_name, nodes_of_step

MEET_TIMEOUT = timedelta(minutes=5)
"""Maximum time that a rank waits for all other ranks to join."""
_SLACK = timedelta(seconds=30)
"""Additional time that other ranks wait for rank 0, which knows the missing ranks."""
_HEARD_TIMEOUT = timedelta(seconds=10)
"""Maximum time that rank 0 waits after a failure until the other ranks have read it."""
_POLL_S = 0.5
_MAX_LISTED = 8
"""Maximum number of missing ranks, and of nodes, that a message lists."""


def meet(rank: int, size: int, timeout: timedelta = MEET_TIMEOUT) -> dist.Store:
    """Waits until all ranks have joined the process group that RANK_NAMES describe. Returns the group's store.

    Raises: UserError on every rank that joined if a rank does not join within `timeout` or rank 0 cannot be reached.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store = _store(rank, size, timeout, deadline)
        store.set(f"met/{rank}", node_name(os.environ))
        if rank == 0:
            missing = _missing(store, size, deadline)
            where = _where(store, set(range(size)).difference(missing)) if missing else ""
            store.set("all met", json.dumps([missing, where]))
            if missing:  # the store may end with this process
                with suppress(dist.DistError):
                    store.wait([f"heard/{other}" for other in range(1, size) if other not in missing], _HEARD_TIMEOUT)
        else:
            store.wait(["all met"], timeout + _SLACK)
            missing, where = json.loads(store.get("all met"))
            store.set(f"heard/{rank}", "")
    except (dist.DistError, TimeoutError) as error:  # torch appends a C++ stack to its reason
        raise UserError(_message(rank, size, _reason(error, timeout))) from error
    if missing:
        ranks = "rank" if len(missing) == 1 else "ranks"
        reason = f"{ranks} {_listed(missing)} did not answer within {_duration(timeout)}; {where}"
        raise UserError(_message(rank, size, reason))
    return store


def connection_lost(rank: int, size: int) -> UserError:
    """Returns the error of a rank that lost another rank after `meet`, before the process group was complete."""
    return UserError(_message(rank, size, "another rank ended while the ranks connected; its log says why"))


def _store(rank: int, size: int, timeout: timedelta, deadline: float) -> dist.Store:
    """Returns the store. Rank 0 creates the store unless torchrun has created one; other ranks connect to it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, size, True, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    _wait_for_port(host, port, deadline)
    return next(rendezvous("env://", rank, size, timeout=timeout))[0]


def _wait_for_port(host: str, port: int, deadline: float) -> None:
    """Waits until the port is open, since torch would print pages of warnings while it waits.

    Raises: TimeoutError if the port is not open at the deadline."""
    while True:
        try:
            limit = max(deadline - time.monotonic(), _POLL_S)
            with socket.create_connection((host, port), timeout=limit) as connection:
                if connection.getsockname() == connection.getpeername():  # the system chose `port` as the source port
                    raise ConnectionRefusedError(f"nothing listens at {host}:{port}")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(str(error)) from error
            time.sleep(_POLL_S)


def _missing(store: dist.Store, size: int, deadline: float) -> list[int]:
    """Waits for all ranks until the deadline. Returns the ranks that have not joined."""
    for rank in range(size):
        left = max(deadline - time.monotonic(), 0.01)
        try:
            store.wait([f"met/{rank}"], timedelta(seconds=left))
        except dist.DistStoreError:
            return [other for other in range(size) if not store.check([f"met/{other}"])]
    return []


def _where(store: dist.Store, ranks: set[int]) -> str:
    """Returns a phrase with the nodes of the ranks that have joined, and the nodes of the Slurm step without such a
    rank."""
    answered = sorted({store.get(f"met/{rank}").decode(errors="replace") for rank in ranks})
    absent = [node for node in nodes_of_step(os.environ) if node not in answered]
    silent = f", none from {_listed(absent)}" if absent else ""
    return f"ranks have answered from {_listed(answered)}{silent}"


def _listed(entries: Sequence[object]) -> str:
    return ", ".join(map(str, entries[:_MAX_LISTED])) + (", ..." if len(entries) > _MAX_LISTED else "")


def _reason(error: Exception, timeout: timedelta) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return f"MASTER_PORT is already in use on this machine ({address}); give a free port"
    if isinstance(error, TimeoutError):
        return f"nothing answered at MASTER_ADDR:MASTER_PORT, {address}, within {_duration(timeout)}"
    return f"the connection to MASTER_ADDR:MASTER_PORT, {address}, broke or had no answer within {_duration(timeout)}"


def _message(rank: int, size: int, reason: str) -> str:
    values = ", ".join(f"{name}={os.environ.get(name)}" for name in RANK_NAMES)
    return f"{reason}; {values} make this process rank {rank} of {size}: start all ranks, or, {left_behind(RANK_NAMES)}"


def _duration(limit: timedelta) -> str:
    seconds = limit.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
