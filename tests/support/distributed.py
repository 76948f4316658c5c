"""Runs a function on several gloo ranks of this machine and brings back what each returned.

The ranks are forked from one server process that has imported torch and DeepSpeed, so a run costs tenths of a second
to start. A rank that fails ends the others and shows its traceback; a run that is too slow is killed whole.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preload"])


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_distributed(fn: Callable[..., Any], world_size: int, timeout_s: float, *args: Any) -> list[Any]:
    """`fn(*args)` on `world_size` ranks; what each returned, by rank.

    `fn` is a module's function; it finds RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* in its environment, as under
    a launcher. Arguments and results travel between processes.

    Raises: RankFailed with the traceback of the first rank that failed, or after `timeout_s` seconds.
    """
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    saved = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)  # the server is started here and hands its environment down
    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        ranks = [_start(fn, args, rank, world_size, store.port) for rank in range(world_size)]
    finally:
        for key, value in saved.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    try:
        return _collect(ranks, time.monotonic() + timeout_s, timeout_s)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _start(fn, args, rank: int, world_size: int, port: int) -> tuple[multiprocessing.Process, Connection]:
    here, there = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_rank_main, args=(fn, args, rank, world_size, port, there), daemon=False)
    process.start()
    there.close()
    return process, here


def _rank_main(fn, args, rank: int, world_size: int, port: int, results: Connection) -> None:
    faulthandler.enable()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the test's process holds the store: no port to race for
    )
    import torch

    torch.set_num_threads(1)
    try:
        answer = True, fn(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    results.send_bytes(pickle.dumps(answer))  # by value: a tensor's shared memory would end with this process
    results.close()
    os._exit(0)  # destructors of process groups wait for ranks that may be dead


def _collect(ranks: list, deadline: float, timeout_s: float) -> list[Any]:
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    answers: list[Any] = [None] * len(ranks)
    failures: dict[int, str] = {}
    while pending and not failures:
        ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending.values())} did not end within {timeout_s} s")
        for connection in ready:
            _receive(connection, pending.pop(connection), ranks, answers, failures)
    if failures:
        settle = time.monotonic() + 1.0  # others fail in consequence: the first story may be in their shadow
        while pending and (ready := wait(list(pending), timeout=max(settle - time.monotonic(), 0))):
            for connection in ready:
                _receive(connection, pending.pop(connection), ranks, answers, failures)
        raise RankFailed("\n".join(f"rank {rank} of {len(ranks)}:\n{story}" for rank, story in failures.items()))
    return answers


def _receive(connection: Connection, rank: int, ranks: list, answers: list, failures: dict[int, str]) -> None:
    ok, value = False, ""
    with suppress(EOFError):
        ok, value = pickle.loads(connection.recv_bytes())
    if ok:
        answers[rank] = value
    else:
        process = ranks[rank][0]
        process.join(5)
        failures[rank] = value or f"the process ended with exit code {process.exitcode} and said nothing"
