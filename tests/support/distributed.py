"""Runs a function on several gloo ranks of this machine and returns the result of each.

The ranks are forked from a server process that has imported torch and DeepSpeed, so they start in tenths of a second.
If a rank fails, the others are ended and its traceback is shown. If a run makes no progress, it is ended and the stacks
of its ranks are shown.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support.progress import IDLE_S, LOOK_S, WHOLE_S, Stalled, Watch, end_tree

THREADS = os.environ.get("UNIVITAR_TEST_THREADS", "1")
"""Threads of a rank."""
_CONTEXT = multiprocessing.get_context("forkserver")
_SERVER = forkserver.ForkServer()
_SERVER.set_forkserver_preload(["tests.support.preload"])


class RankFailed(AssertionError):
    """A rank raised, died or made no progress."""


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, **limits: Any) -> list[Any]:
    """Run `fn(*args)` on `world_size` ranks; returns the results by rank.

    `fn` is a module-level function; its environment has RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*, as under a launcher.
    Arguments and results are pickled. `limits` are those of `Watch`, for tests of the limits only.

    Raises: RankFailed with the traceback of the first rank that failed, or with the stacks of all ranks if there is no
    progress.
    """
    environment = {"OMP_NUM_THREADS": THREADS, "DS_ACCELERATOR": "cpu"}
    saved = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)  # inherited by the server, which starts here
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks: list[tuple[multiprocessing.Process, Connection]] = []
        try:
            try:
                timeout = timedelta(seconds=WHOLE_S)  # on a busy machine ranks may start at very different times
                store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
                for rank in range(world_size):
                    ranks.append(_start(fn, args, rank, world_size, store.port, Path(folder)))
            finally:
                for key, value in saved.items():
                    if value is None:
                        del os.environ[key]
                    else:
                        os.environ[key] = value
            return _collect(ranks, Path(folder), limits)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


@contextmanager
def _own_server() -> Iterator[None]:
    """Use a separate fork server. multiprocessing has one per process, and its first use decides what it imports and
    which signals it blocks."""
    shared = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _SERVER.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = shared


def _start(fn, args, rank, world_size, port, folder: Path) -> tuple[multiprocessing.Process, Connection]:
    here, there = _CONTEXT.Pipe(duplex=False)
    arguments = (fn, args, rank, world_size, port, there, _stack_file(folder, rank))
    process = _CONTEXT.Process(target=_rank_main, args=arguments, daemon=False)
    with _own_server():
        process.start()
    there.close()
    return process, here


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def _rank_main(fn, args, rank: int, world_size: int, port: int, results: Connection, stacks: Path) -> None:
    faulthandler.enable(stacks.open("w"))  # writes all stacks at a crash or when a stalled run is ended
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the test's process holds the store, so ranks open no port
    )
    import torch

    torch.set_num_threads(int(THREADS))
    try:
        answer = True, fn(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    for child in multiprocessing.active_children():  # a library's helpers; the rank is killed once it has answered
        child.kill()
    results.send_bytes(pickle.dumps(answer))  # by value, because a tensor's shared memory is freed with this process
    results.close()
    os._exit(0)  # destructors of process groups would wait for ranks that may be dead


def _collect(ranks: list, folder: Path, limits: dict[str, Any]) -> list[Any]:
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    answers: list[Any] = [None] * len(ranks)
    failures: dict[int, str] = {}

    def of() -> dict[str, int]:
        return {f"rank {rank}": ranks[rank][0].pid for rank in sorted(pending.values())}

    watch = Watch(f"{len(ranks)} ranks", of, **limits)
    while pending and not failures:
        for connection in wait(list(pending), timeout=LOOK_S):
            _receive(connection, pending.pop(connection), ranks, folder, answers, failures)
        try:
            watch.check()
        except Stalled as stalled:
            raise RankFailed(f"{stalled}\n{_end_with_stacks(of(), folder)}") from None
    if failures:
        settle = time.monotonic() + 1.0  # other ranks fail as a consequence: collect the tracebacks of all of them
        while pending and (ready := wait(list(pending), timeout=max(settle - time.monotonic(), 0))):
            for connection in ready:
                _receive(connection, pending.pop(connection), ranks, folder, answers, failures)
        raise RankFailed("\n".join(f"rank {rank} of {len(ranks)}:\n{text}" for rank, text in failures.items()))
    return answers


def _end_with_stacks(ranks: dict[str, int], folder: Path) -> str:
    end_tree(*ranks.values())
    return "\n".join(f"{name}:\n{_stacks(folder, int(name.split()[1]))}" for name in ranks)


def _stacks(folder: Path, rank: int) -> str:
    path = _stack_file(folder, rank)
    return path.read_text() if path.exists() else ""


def _receive(
    connection: Connection, rank: int, ranks: list, folder: Path, answers: list, failures: dict[int, str]
) -> None:
    ok, value = False, ""
    with suppress(EOFError):
        ok, value = pickle.loads(connection.recv_bytes())
    if ok:
        answers[rank] = value
    else:
        process = ranks[rank][0]
        process.join(IDLE_S)
        failures[rank] = value or (
            f"the process ended with exit code {process.exitcode} and no result\n{_stacks(folder, rank)}"
        )
