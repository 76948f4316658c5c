"""Runs all checks, in a single process or as one rank of a launcher."""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

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
    from_error,
    merged,
    ranks_named,
)
from univitar_ds.doctor.ranks import Ranks, who_is_silent
from univitar_ds.errors import UserError, first_line
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
"""Default limit of a check in seconds. Importing all packages from a busy disk takes a minute."""


def examine(recipe: str | None, overrides: Sequence[str] = (), limit_s: float = LIMIT_S) -> Report:
    """Runs all checks. Under a launcher, including `srun`, this process is one rank. Leaves no file on a disk.

    Args: recipe: a run file, the name of a recipe or the folder of a run; None: only the machines are checked;
        overrides: KEY=VALUE for keys of the run file; limit_s: seconds that a check may take, and that a rank waits for
        other ranks.
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
    ranks.exchange_nodes(node_name(os.environ))
    for number, check in enumerate(checks):
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
    """Returns the result of `check.run` on this rank; a failed row if it raises or exceeds the limit."""
    answers: queue.SimpleQueue[Found] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put(check.run(context))
        except UserError as error:
            answers.put(Found(from_error(check.name, error)))
        except Exception as error:  # one broken check must not hide the others
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {first_line(error)}"
            answers.put(Found([Row(check.name, FAILED, text, f"see the traceback in the log; {check.remedy}")]))

    threading.Thread(target=work, name=f"check of {check.name}", daemon=True).start()
    try:
        return answers.get(timeout=context.ranks.limit_s)
    except queue.Empty:
        context.hung = True
        text = f"no answer within {context.ranks.limit_s:g} s (limit)"
        return Found([Row(check.name, FAILED, text, check.remedy)])
