"""Compares the clocks of the nodes."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Answers, Found, Row, listed
from univitar_ds.errors import UserError

NAME = "clocks"
ROUNDS = 5
LIMIT_S = 1.0
"""Maximum difference of clocks in seconds. With more, merged logs of several nodes are out of order. S3 refuses
requests only if a clock is wrong by minutes."""


def now() -> float:
    """Returns the time of this clock in seconds."""
    return time.time()


def _check(context: Context) -> Found:
    """Compares this clock with that of rank 0, which writes its time into the store while all ranks wait for it.

    The delay until a rank reads the time is part of the difference, so the minimum over several rounds is used.
    """
    ranks = context.ranks
    if len(ranks.firsts()) == 1:
        return Found()
    ahead = []
    for number in range(ROUNDS):
        try:
            ahead.append(_ahead(context, f"clock {number}"))
        except dist.DistError as error:
            raise UserError(f"the ranks do not answer within {ranks.limit_s:g} s; see the rows 'ranks'") from error
    return Found(values={"ahead_s": min(ahead)})


def _ahead(context: Context, key: str) -> float:
    """Returns the seconds by which this clock is ahead of that of rank 0; 0.0 on rank 0."""
    ranks, limit = context.ranks, timedelta(seconds=context.ranks.limit_s)
    nodes = len(ranks.firsts())
    if ranks.store.add(f"{key} ready", 1) == nodes:
        ranks.store.set(f"{key} all", "")
    if ranks.is_main:
        ranks.store.wait([f"{key} all"], limit)
        ranks.store.set(key, repr(now()))
        return 0.0
    ranks.store.wait([key], limit)
    here = now()
    return here - float(ranks.store.get(key))


def compare(answers: Answers) -> list[Row]:
    """Returns a row, which is failed and names the nodes if clocks differ by more than LIMIT_S from that of rank 0."""
    ahead = answers.by_node("ahead_s", max)
    if len(ahead) < 2:
        return [Row(NAME, SKIPPED, "one node: there is no other clock to compare with")]
    span = max(ahead.values()) - min(ahead.values())
    numbers = {"skew_s": span}
    wrong = {node: value for node, value in ahead.items() if abs(value) > LIMIT_S}
    if not wrong:
        return [Row(NAME, OK, f"differ by at most {span:.3f} s on {len(ahead)} nodes", numbers=numbers)]
    texts = [f"{node} by {value:+.1f} s" for node, value in sorted(wrong.items(), key=lambda one: -abs(one[1]))]
    text = f"differ from the clock of {answers.nodes[0]}: {listed(texts)} (limit {LIMIT_S:g} s)"
    return [Row(NAME, FAILED, text, "start chronyd or another NTP client on these nodes", numbers=numbers)]


CHECK = Check(NAME, _check, "see the row 'ranks'", together=True, compare=compare)
