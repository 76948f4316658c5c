"""Runs all checks, in a single process or as one rank of a launcher."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from univitar_ds import startup
from univitar_ds.data.storage.session import remove_session_folder
from univitar_ds.doctor import (
    checkpoints,
    clocks,
    connection,
    gpus,
    limits,
    network,
    operations,
    run_file,
    speed,
    storage,
    versions,
)
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import (
    FAILED,
    SKIPPED,
    Answers,
    Found,
    Report,
    Row,
    from_any,
    merged,
    ranks_named,
)
from univitar_ds.doctor.ranks import Ranks, who_is_silent
from univitar_ds.processes import Idle
from univitar_ds.training.distributed import orphans, preemption
from univitar_ds.training.distributed.launchers import is_rank
from univitar_ds.training.distributed.preemption import Stop
from univitar_ds.training.distributed.rendezvous import meet
from univitar_ds.training.distributed.slurm import node_name

CHECKS = (
    run_file.CHECK,
    versions.CHECK,
    gpus.CHECK,
    connection.GPU_CHECK,
    operations.CHECK,
    limits.CHECK,
    run_file.PARTS_CHECK,
    storage.CHECK,
    checkpoints.CHECK,
    checkpoints.SHARED_CHECK,
    clocks.CHECK,
    connection.CHECK,
    speed.CHECK,
    network.CHECK,
)
"""The checks in their order. An invalid run file is in the first row; no rank allocates GPU memory before all ranks
have read how much is in use; checks that may hang a rank come last."""
LIMIT_S = 120.0
"""Default limit in seconds of a check without progress."""
LOOK_S = 1.0
"""Seconds between two readings of the progress of a check."""
MOST = 10
"""Number of limits after which a check ends even if it makes progress."""


def examine(recipe: str | None, overrides: Sequence[str] = (), limit_s: float = LIMIT_S) -> Report:
    """Runs all checks. Under a launcher, including `srun`, this process is one rank. Leaves no file on a disk.

    Args: recipe: a run file, the name of a recipe or the folder of a run; None: only the machines are checked;
        overrides: KEY=VALUE for keys of the run file; limit_s: seconds that a check may take without progress, or with
        communication between ranks, and that a rank waits for other ranks.
    Returns: the report, which has rows on rank 0 only.
    Raises: UserError if the launcher's variables are invalid, a rank does not join, or rank 0 ends before the others.
        The message names the missing ranks.
    """
    context = Context(_join(limit_s), recipe, overrides)
    if context.ranks.size > 1:
        stop = Stop(leaving=lambda: clean(context))
        stop.quiet = True  # the message of `Stop` is about the checkpoint of a run
        orphans.end_with_launchers(preemption.listen(stop))
    run_file.take_run(context)
    rows = check_all(context, CHECKS)
    return Report(rows, context.ranks.nodes, context.ranks.is_main, context.hung)


def check_all(context: Context, checks: Sequence[Check]) -> list[Row]:
    """Returns the rows of `checks` on rank 0, and [] on other ranks. All ranks must call it with the same checks."""
    ranks, rows = context.ranks, []
    startup.phase("waiting for all ranks")
    ranks.exchange_nodes(node_name(os.environ))
    for number, check in enumerate(checks):
        startup.phase(f"checking: {check.name}")
        rows += _run(check, f"{number} {check.name}", context)
    for rank, place in ranks.silent.items():
        node = ranks.nodes[rank]
        where = {"node": "exchange of node names", "usable": connection.NAME}.get(place) or place.partition(" ")[2]
        text = f"{ranks_named([rank], ranks.nodes)} did not answer within {ranks.limit_s:g} s, first in: {where}"
        remedy = "see that rank's log and its node" + (f"; leave it out with sbatch --exclude={node}" if node else "")
        rows.append(Row(connection.NAME, FAILED, text, remedy))
    ranks.end()
    return rows


def clean(context: Context | None = None) -> None:
    """Removes the files that Python's exit handlers would remove, for a process that ends without them."""
    if context is not None:
        context.remove_files()
    remove_session_folder()


def _join(limit_s: float) -> Ranks:
    if not is_rank(os.environ):
        return Ranks(dist.HashStore(), 0, 1, limit_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.HashStore() if size == 1 else meet(rank, size, timedelta(seconds=limit_s))
    return Ranks(store, rank, size, limit_s)


def _run(check: Check, key: str, context: Context) -> list[Row]:
    """Runs one check on the ranks that it needs. Returns its rows on rank 0, and [] on other ranks.

    Args: key: unique name of the exchange of its results.
    """
    ranks = context.ranks
    absent = ranks.arrive(key) if check.together else []
    if absent:
        return [Row(check.name, SKIPPED, f"needs all ranks: {who_is_silent(absent, ranks.nodes)}")] * ranks.is_main
    if check.everywhere or ranks.first_of_node:
        ranks.post(key, run_within_limit(check, context).to_json())
    if not ranks.is_main:
        return []
    answers = ranks.collect(key, None if check.everywhere else ranks.firsts())
    found = {rank: Found.from_json(answer) for rank, answer in answers.items()}
    rows = merged({rank: one.rows for rank, one in found.items()}, ranks.nodes)
    if check.compare is not None:
        rows += check.compare(Answers({rank: one.values for rank, one in found.items()}, ranks.nodes))
    return rows


def run_within_limit(check: Check, context: Context) -> Found:
    """Returns the result of `check.run` on this rank; a failed row if it raises, or makes no progress within the limit.

    For a check in which ranks communicate the limit holds for the whole check, since a process that waits for others on
    a GPU uses CPU time.
    """
    answers: queue.SimpleQueue[Found] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(check.run(context))
        except Exception as error:  # one broken check must not hide the others
            answers.put(Found(from_any(check.name, error, check.remedy)))

    threading.Thread(target=work, name=f"check of {check.name}", daemon=True).start()
    limit_s, begin = context.ranks.limit_s, time.monotonic()
    idle = Idle(limit_s)
    while True:
        try:
            return answers.get(timeout=min(LOOK_S, limit_s / 4))
        except queue.Empty:
            if not check.together and idle.moved():
                context.ranks.beat()
            if idle.seconds >= limit_s:
                text = "no answer within" if check.together else "no answer and no progress for"
                text += f" {limit_s:g} s (limit)"
                break
            if time.monotonic() - begin >= MOST * limit_s:
                text = f"no answer within {MOST * limit_s:g} s, {MOST} times the limit"
                break
    context.hung = True
    return Found([Row(check.name, FAILED, text, check.remedy)])
