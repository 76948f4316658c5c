"""The numbers that the ranks exchange before and after a step.

Before it: a loss is divided by the items, labels or tokens of all ranks, and a partitioned teacher runs equally often
on all ranks. These numbers follow from sizes and labels, so they travel in the message in which the ranks agree on the
step. After it: the losses that are sums over ranks travel with the metrics (`Gather`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from univitar_ds.classes import ClassList
from univitar_ds.geometry import token_count
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.teacher.teacher import Teacher
from univitar_ds.training.distributed.process_group import World, gather_numbers

Gather = Callable[[list[float]], Tensor]
"""Sends the numbers of this rank to all ranks; returns those of every rank, (size, numbers) float64 on the host."""

_OF_LOSS, _OF_TEACHER = 2, 2


class Sized(Protocol):
    """The fields of a pack that are counted; `data.batch.PackedBatch` has them."""

    grid_thw: Tensor


class Labelled(Protocol):
    """Those of a pack with labels."""

    labels: list[str | None]
    sets: list[str | None]


@dataclass(frozen=True)
class StepCounts:
    """The numbers of every rank, on the host.

    `items`: (size,) int64. `labelled`: items with a label of the run's classes, over all ranks; 0 without classes.
    `teacher`: None if the teacher does not run.
    """

    items: Tensor
    labelled: int
    teacher: TeacherCounts | None


@dataclass(frozen=True)
class TeacherCounts:
    """Over all ranks: tokens that the student encodes of items that the teacher supports, and these items, at least 1
    each; and for each pack of a rank the largest number of forward passes that a rank needs."""

    tokens: int
    items: int
    forwards: list[int]


def numbers_of(packs: int, *, distills: bool) -> int:
    """Returns how many numbers `own_counts` has for `packs` packs of a rank."""
    return _OF_LOSS + (_OF_TEACHER + packs if distills else 0)


def own_counts(
    packs: Sequence[Sized], dropping: DropConfig, teacher: Teacher | None = None, classes: ClassList | None = None
) -> list[int]:
    """Returns the numbers of this rank. Args: teacher: None if it does not run; classes: None without labels."""
    items = sum(len(pack.grid_thw) for pack in packs)
    numbers = [items, 0 if classes is None else sum(row >= 0 for pack in packs for row in rows_of(pack, classes))]
    if teacher is None:
        return numbers
    lengths = [
        dropping.kept(token_count(grid))
        for pack in packs
        for grid, supported in zip(pack.grid_thw.tolist(), teacher.supports(pack.grid_thw), strict=True)
        if supported
    ]
    return [*numbers, sum(lengths), len(lengths), *(teacher.num_forwards(pack.grid_thw) for pack in packs)]


def over_ranks(table: Tensor) -> StepCounts:
    """Returns the counts of all ranks. Args: table: (size, numbers) int64, `own_counts` of every rank."""
    totals, teacher = table.sum(0).tolist(), None
    if len(totals) > _OF_LOSS:
        tokens, items = (max(total, 1) for total in totals[_OF_LOSS : _OF_LOSS + _OF_TEACHER])
        teacher = TeacherCounts(tokens, items, table[:, _OF_LOSS + _OF_TEACHER :].amax(0).tolist())
    return StepCounts(table[:, 0].contiguous(), totals[1], teacher)


def exchanged(own: list[int], world: World) -> StepCounts:
    """Returns the counts of all ranks, in a message of their own. All ranks call it. Args: own: see `own_counts`."""
    return over_ranks(gather_numbers(own, world).long())


def rows_of(pack: Labelled, classes: ClassList) -> list[int]:
    """Returns the class of each item of a pack, -1 without a label of `classes`."""
    found = [classes.row(name, label) for name, label in zip(pack.sets, pack.labels, strict=True)]
    return [-1 if row is None else row for row in found]


def alone(numbers: list[float]) -> Tensor:
    """Sends nothing; a `Gather` for numbers that every rank has."""
    return torch.tensor([numbers], dtype=torch.float64)


def agreed(gather: Gather, shared: Sequence[float], *parts: Sequence[float]) -> list[list[float]]:
    """Returns `shared` as rank 0 has it, and the sum over ranks of each part. All ranks call it.

    Args: shared: numbers that ranks have computed from the same sums. What is decided by them is decided alike by all
    ranks, even if a collective gave them different bits.
    """
    table = gather([*shared, *(number for part in parts for number in part)])
    own, *rest = table.split([len(shared), *map(len, parts)], dim=1)
    return [own[0].tolist(), *(part.contiguous().sum(0).tolist() for part in rest)]
