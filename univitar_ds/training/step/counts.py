"""The numbers that the ranks exchange before and after a step.

Before a step: a loss is divided by the items, labels or tokens of all ranks, and a partitioned teacher runs equally
often on all ranks. These numbers follow from sizes and labels, so they are sent in the message in which the ranks agree
to run the step. After a step: losses that are sums over ranks are sent with the metrics (`Gather`).
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
    """The fields of a pack from which labels are counted."""

    labels: list[str | None]
    sets: list[str | None]


@dataclass(frozen=True)
class StepCounts:
    """Counts of a step, on the host.

    `items`: items of each rank, (size,) int64; `labelled`: items with a label of the run's classes, over all ranks, 0
    without classes; `teacher`: None if the teacher does not run.
    """

    items: Tensor
    labelled: int
    teacher: TeacherCounts | None


@dataclass(frozen=True)
class TeacherCounts:
    """Counts over all ranks of the items that the teacher supports.

    `tokens`: tokens of these items that the student encodes, at least 1; `items`: their number, at least 1; `forwards`:
    for each pack of a rank, the largest number of forward passes of the teacher that any rank needs.
    """

    tokens: int
    items: int
    forwards: list[int]


def numbers_of(packs: int, *, distills: bool) -> int:
    """Returns the number of values that `own_counts` returns for `packs` packs of a rank."""
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
    """Exchanges the counts in a separate message and returns those of all ranks. All ranks call it.

    Args: own: see `own_counts`."""
    return over_ranks(gather_numbers(own, world).long())


def rows_of(pack: Labelled, classes: ClassList) -> list[int]:
    """Returns the class of each item of a pack, -1 without a label of `classes`."""
    found = [classes.row(name, label) for name, label in zip(pack.sets, pack.labels, strict=True)]
    return [-1 if row is None else row for row in found]


def alone(numbers: list[float]) -> Tensor:
    """A `Gather` without communication, for numbers that are the same on every rank."""
    return torch.tensor([numbers], dtype=torch.float64)


def agreed(gather: Gather, shared: Sequence[float], *parts: Sequence[float]) -> list[list[float]]:
    """Returns `shared` of rank 0, and the sum over ranks of each part. All ranks call it.

    Args: shared: numbers that all ranks have computed from the same sums. With those of rank 0 all ranks decide in the
        same way, even if a collective has rounded differently on some of them.
    """
    table = gather([*shared, *(number for part in parts for number in part)])
    own, *rest = table.split([len(shared), *map(len, parts)], dim=1)
    return [own[0].tolist(), *(part.contiguous().sum(0).tolist() for part in rest)]
