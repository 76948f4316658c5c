"""Gathers on rank 0 the embeddings or classified items that each rank has computed from its share of the items."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.evaluation.classification import Hits
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.training.distributed.process_group import World, gather_json_to_main, gather_numbers

AT_ONCE = 1 << 24
"""Number of elements, over all ranks, that are gathered at a time: 67 MB on rank 0's device."""


def gathered_embeddings(own: Sequence[Embeddings], world: World) -> list[Embeddings] | None:
    """Returns the embeddings of all ranks on rank 0, in the order of the ranks, and None on other ranks.

    Args: own: of this rank's items, by several models; they differ only in the vectors.
    """
    counts = gather_numbers([len(own[0])], world)[:, 0].long().tolist()
    parts = gather_json_to_main(_described(own[0]), world)
    vectors = [(_rows(one.vision, counts, world), _rows(one.text, counts, world)) for one in own]
    if parts is None:
        return None
    joined: dict[str, Any] = {name: [row for part in parts for row in part[name]] for name in parts[0] if name != "bad"}
    joined["others"] = [tuple(row) for row in joined["others"]]
    bad: Counter[str] = Counter()
    for part in parts:
        bad.update(part["bad"])
    return [
        replace(one, vision=vision, text=text, bad=bad, **joined)
        for one, (vision, text) in zip(own, vectors, strict=True)
    ]


def _described(one: Embeddings) -> dict[str, Any]:
    """Returns the fields of embeddings except the vectors, as JSON."""
    names = ("captions", "caption_ids", "labels", "sets", "keys")
    return {**{name: getattr(one, name) for name in names}, "others": list(one.others), "bad": dict(one.bad)}


def _rows(own: Tensor, counts: Sequence[int], world: World) -> Tensor | None:
    """Returns the (sum(counts), E) rows of all ranks on the host of rank 0, None on other ranks.

    Args: own: (n, E) float32 on the host; counts: n of each rank.
    """
    if world.size == 1:
        return own
    most, step = max(counts), max(1, AT_ONCE // (world.size * own.shape[1]))
    parts: list[list[Tensor]] = [[own[:0]] for _ in counts]
    for begin in range(0, most, step):
        sent = torch.zeros(min(step, most - begin), own.shape[1], device=world.device)
        some = own[begin : begin + len(sent)]
        sent[: len(some)].copy_(some)
        received = sent.new_empty(world.size if world.is_main else 0, *sent.shape)
        dist.gather(sent, list(received) if world.is_main else None, dst=0)
        # On a GPU one copy for all ranks, since the host waits for each.
        for part, rows, count in zip(parts, received.cpu(), counts, strict=False):
            part.append(rows[: max(0, count - begin)])
    return torch.cat([rows for part in parts for rows in part]) if world.is_main else None


def gathered_hits(own: Sequence[Hits], world: World) -> list[Hits] | None:
    """Returns the hits of all ranks on rank 0, in the order of the ranks, and None on other ranks.

    Args: own: of this rank's items, by several models."""
    parts = gather_json_to_main([_hits_described(one) for one in own], world)
    if parts is None:
        return None
    return [_joined([part[number] for part in parts]) for number in range(len(own))]


def _hits_described(one: Hits) -> dict[str, Any]:
    sets = [[name, one.truth[name].tolist(), one.among[name].tolist()] for name in one.truth]
    return {"sets": sets, "left": dict(one.left)}


def _joined(parts: Sequence[dict[str, Any]]) -> Hits:
    truth: dict[str | None, list[Tensor]] = {}
    among: dict[str | None, list[Tensor]] = {}
    left: Counter[str] = Counter()
    for part in parts:
        left.update(part["left"])
        for name, classes, hits in part["sets"]:
            truth.setdefault(name, []).append(torch.tensor(classes))
            among.setdefault(name, []).append(torch.tensor(hits, dtype=torch.float64))
    return Hits(
        {name: torch.cat(each) for name, each in truth.items()},
        {name: torch.cat(each, dim=1) for name, each in among.items()},
        left,
    )
