"""One optimizer update with the classification loss, over one pack from every lane, for any number of ranks.

The loss is a sum over items, so each pack runs once, and its loss is divided by the number of labelled items of the
step over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from univitar_ds.classes import ClassList
from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.model.teacher.teacher import Teacher
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.classification import Targets, class_loss
from univitar_ds.objectives.mixing import Mix, mix_pixels, plan_mixing
from univitar_ds.training.distributed.process_group import gather_numbers
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.step.counts import Gather, StepCounts, agreed, exchanged, own_counts, rows_of
from univitar_ds.training.step.distillation import NO_DISTILLATION, Distillation
from univitar_ds.training.step.guard import nan_if_not_finite
from univitar_ds.training.step.pack_share import own_rows, whole_of
from univitar_ds.training.step.train_step import DivergedError, NotFiniteError, StepResult, StepSettings, not_finite
from univitar_ds.training.step.upload import pixels_on


class LabelledBatch(Protocol):
    """The fields of a pack that a step reads; `data.batch.PackedBatch` has them."""

    pixels: torch.Tensor
    frames: torch.Tensor
    grid_thw: torch.Tensor
    labels: list[str | None]
    sets: list[str | None]
    lane: int


def classification_step(
    engine: Engine,
    batches: Sequence[LabelledBatch],
    settings: StepSettings,
    objective: ObjectiveConfig,
    classes: ClassList,
    teacher: Teacher | None = None,
    counts: StepCounts | None = None,
    gather: Gather | None = None,
) -> StepResult:
    """Updates the parameters once. Arguments, result and errors are those of `train_step`.

    `settings.contrastive_weight` is the weight of the classification loss. Items without a label of `classes` have no
    loss. Items of a pack are mixed as `objective.classification` sets, see `objectives.mixing`.
    """
    engine.zero_grad(settings.lr, read_gradient=settings.read_gradient)
    world, wanted = engine.groups.data, objective.classification
    wholes = [whole_of(batch) for batch in batches]
    drops = [settings.dropping.of_pack(batch.grid_thw.tolist(), batch.lane) for batch in wholes]
    if counts is None:
        running = teacher if settings.distill_weight else None
        counts = exchanged(own_counts(batches, settings.dropping, running, classes), world)
    distillation = None
    if settings.distill_weight:
        distillation = Distillation(teacher, objective.teacher, settings.distill_weight, batches, drops, counts.teacher)
    rows = [rows_of(batch, classes) for batch in wholes]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for index, (batch, own, dropped) in enumerate(zip(wholes, rows, drops, strict=True)):
        grids, frames = batch.grid_thw.tolist(), batch.frames.tolist()
        kinds = [None if row < 0 else (name, count) for row, name, count in zip(own, batch.sets, frames, strict=True)]
        key = (settings.dropping.seed, "mixing", settings.dropping.step, batch.lane)
        plan = plan_mixing(grids, kinds, mixup=wanted.mixup, cutmix=wanted.cutmix, key=key)
        pixels = pixels_on(world.device, batch.pixels)
        if any(plan):
            pixels = mix_pixels(pixels, frames, grids, plan)
        features = distillation.features(index, pixels) if distillation else None
        output = engine(pixels, batch.frames, batch.grid_thw, bool(distillation), dropped)
        targets = _targets(batches[index], own, plan, classes, world.device)
        loss = class_loss(output.logits, targets, wanted.label_smoothing) / max(counts.labelled, 1)
        total += loss.detach().double()
        loss = settings.contrastive_weight * loss
        loss = nan_if_not_finite(loss)
        engine.backward(loss + distillation.loss(output.distilled, features) if distillation else loss)
        engine.step(_report(total, distillation) if index == len(batches) - 1 else None)
    own, *sums = engine.reported
    items = int(counts.items.sum())
    send = partial(gather_numbers, world=world)
    if not engine.updated or not math.isfinite(engine.grad_norm):
        _, (mean,) = agreed(send, [], [own])
        reason = not_finite(mean, settings.lr)
        raise DivergedError(reason) if engine.updated else NotFiniteError(reason, items)
    (norm,), (mean,), totals = agreed(gather or send, [engine.grad_norm], [own], sums)
    distilled = distillation.result(totals) if distillation else NO_DISTILLATION
    return StepResult(
        loss=settings.contrastive_weight * mean + distilled.loss,
        items=items,
        grad_norm=norm,
        losses={"classification": mean, **distilled.losses},
        agreement=distilled.agreement,
    )


def _report(total: torch.Tensor, distillation: Distillation | None) -> torch.Tensor:
    """Returns this rank's part of the sums in the step's result: the loss, and those of distillation.

    The host reads them together with the gradient norm, so that it waits for the device once in a step."""
    return torch.cat([total.reshape(1), distillation.sums]) if distillation else total.reshape(1)


def _targets(
    batch: LabelledBatch, rows: Sequence[int], plan: Sequence[Mix | None], classes: ClassList, device: torch.device
) -> Targets:
    """Returns the targets of a pack's own items. Args: rows, plan: of the whole pack."""
    second = [row if mix is None else rows[mix.partner] for row, mix in zip(rows, plan, strict=True)]
    rows, second, plan = (own_rows(batch, one) for one in (rows, second, plan))
    spans = [classes.spans.get(name, (0, 0)) for name in batch.sets]
    numbers = torch.tensor([rows, second, [begin for begin, _ in spans], [end for _, end in spans]], dtype=torch.int64)
    first, second, begin, end = to_device(numbers, device).unbind()
    shares = torch.tensor([1.0 if mix is None else mix.share for mix in plan], dtype=torch.float32)
    return Targets(first, second, to_device(shares, device), begin, end)
