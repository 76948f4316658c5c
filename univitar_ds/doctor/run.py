"""Runs all checks, alone or as one rank of a launcher."""

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
    gpus,
    limits,
    meeting,
    network,
    operations,
    run_file,
    speed,
    storage,
    versions,
)
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
from univitar_ds.doctor.scene import Check, Scene
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
    meeting.GPU,
    operations.CHECK,
    limits.CHECK,
    run_file.PARTS_CHECK,
    storage.CHECK,
    checkpoints.CHECK,
    checkpoints.SHARED_CHECK,
    clocks.CHECK,
    meeting.MEETING,
    speed.CHECK,
    network.CHECK,
)
"""In this order: a wrong run file is the first row; no rank allocates GPU memory before all have looked at its use;
checks that may hang a rank come last."""
LIMIT_S = 120.0
"""Default limit of a check in seconds: importing all packages from a busy disk takes a minute."""


def examine(recipe: str | None, overrides: Sequence[str] = (), limit_s: float = LIMIT_S) -> Report:
    """Runs all checks. Under a launcher, `srun` included, this process is one rank. Nothing stays on a disk.

    Args: recipe: a run file, the name of a recipe or the folder of a run; None: the machines only. limit_s: seconds
        that a check may take, and that a rank waits for the others.
    Returns: the report; without rows on other ranks than rank 0.
    Raises: UserError if the launcher's variables are wrong, a rank does not join, or rank 0 ends before the others. The
        message names the ranks that are missing.
    """
    scene = Scene(_join(limit_s), recipe, overrides)
    if scene.ranks.size > 1:
        stop = Stop(leaving=lambda: clean(scene))
        stop.quiet = True  # its message is about a run's checkpoint
        orphans.end_with_launchers(preemption.listen(stop))
    run_file.take_run(scene)
    rows = check_all(scene, CHECKS)
    return Report(rows, scene.ranks.nodes, scene.ranks.is_main, scene.hung)


def check_all(scene: Scene, checks: Sequence[Check]) -> list[Row]:
    """Returns the rows of these checks on rank 0, and none on other ranks. All ranks call it with the same checks."""
    ranks, rows = scene.ranks, []
    ranks.introduce(node_name(os.environ))
    for number, check in enumerate(checks):
        rows += _run(check, f"{number} {check.name}", scene)
    for rank, place in ranks.silent.items():
        node = ranks.nodes[rank]
        where = {"node": "introduction", "usable": meeting.NAME}.get(place) or place.partition(" ")[2]
        text = f"{ranks_named([rank], ranks.nodes)} did not answer within {ranks.limit_s:g} s, first in: {where}"
        remedy = "see that rank's log and its node" + (f"; leave it out with sbatch --exclude={node}" if node else "")
        rows.append(Row(meeting.NAME, FAILED, text, remedy))
    ranks.end()
    return rows


def clean(scene: Scene | None = None) -> None:
    """Removes what a process that ends without Python's exit handlers would leave."""
    if scene is not None:
        scene.forget_files()
    remove_session_folder()


def _join(limit_s: float) -> Ranks:
    if not is_rank(os.environ):
        return Ranks(dist.HashStore(), 0, 1, limit_s)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.HashStore() if size == 1 else meet(rank, size, timedelta(seconds=limit_s))
    return Ranks(store, rank, size, limit_s)


def _run(check: Check, key: str, scene: Scene) -> list[Row]:
    """Runs one check on the ranks that it needs. Returns its rows on rank 0. Args: key: name of its exchange."""
    ranks = scene.ranks
    absent = ranks.arrive(key) if check.together else []
    if absent:
        return [Row(check.name, SKIPPED, f"needs all ranks: {who_is_silent(absent, ranks.nodes)}")] * ranks.is_main
    if check.everywhere or ranks.first_of_node:
        ranks.post(key, look_within(check, scene).to_json())
    if not ranks.is_main:
        return []
    answers = ranks.collect(key, None if check.everywhere else ranks.firsts())
    found = {rank: Found.from_json(answer) for rank, answer in answers.items()}
    rows = merged({rank: one.rows for rank, one in found.items()}, ranks.nodes)
    if check.compare is not None:
        rows += check.compare(Answers({rank: one.values for rank, one in found.items()}, ranks.nodes))
    return rows


def look_within(check: Check, scene: Scene) -> Found:
    """Returns what the check finds on this rank; a failed row if it raises, or does not answer within the limit."""
    answers: queue.SimpleQueue[Found] = queue.SimpleQueue()

    def look() -> None:
        try:
            answers.put(check.look(scene))
        except UserError as error:
            answers.put(Found(from_error(check.name, error)))
        except Exception as error:  # one broken check must not hide the others
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {first_line(error)}"
            answers.put(Found([Row(check.name, FAILED, text, f"see the traceback in the log; {check.remedy}")]))

    threading.Thread(target=look, name=f"check of {check.name}", daemon=True).start()
    try:
        return answers.get(timeout=scene.ranks.limit_s)
    except queue.Empty:
        scene.hung = True
        text = f"no answer within {scene.ranks.limit_s:g} s (limit)"
        return Found([Row(check.name, FAILED, text, check.remedy)])
