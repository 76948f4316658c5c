"""One optimizer update with the classification loss, over one pack from every lane, for any number of ranks.

The loss is a sum over items, so each pack runs once, and its part of the loss is divided by the number of labelled
items of the step over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from univitar_ds.classes import ClassList
from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.model.teacher.teacher import Teacher
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.classification import Targets, class_loss
from univitar_ds.objectives.mixing import Mix, mix_pixels, plan_mixing
from univitar_ds.training.distributed.process_group import World, gather_numbers, gather_tensor
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.step.distillation import NO_DISTILLATION, Distillation
from univitar_ds.training.step.guard import nan_if_not_finite
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
) -> StepResult:
    """Updates the parameters once. Arguments, result and errors are those of `train_step`.

    `settings.contrastive_weight` weights the classification loss. Items without a label of `classes` have no loss.
    Items of a pack are mixed as `objective.classification` says, see `objectives.mixing`.
    """
    engine.zero_grad(settings.lr, read_gradient=settings.read_gradient)
    world, wanted = engine.world, objective.classification
    drops = [settings.dropping.of_pack(batch.grid_thw.tolist(), batch.lane) for batch in batches]
    distillation = None
    if settings.distill_weight:
        distillation = Distillation(teacher, objective.teacher, settings.distill_weight, batches, drops, world)
    rows = [_rows(batch, classes) for batch in batches]
    counts = [sum(row >= 0 for one in rows for row in one), sum(map(len, rows))]
    labelled, items = (int(count) for count in gather_numbers(counts, world).sum(0))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for index, (batch, own, dropped) in enumerate(zip(batches, rows, drops, strict=True)):
        grids, frames = batch.grid_thw.tolist(), batch.frames.tolist()
        alike = [None if row < 0 else (name, count) for row, name, count in zip(own, batch.sets, frames, strict=True)]
        key = (settings.dropping.seed, "mixing", settings.dropping.step, batch.lane)
        plan = plan_mixing(grids, alike, mixup=wanted.mixup, cutmix=wanted.cutmix, key=key)
        pixels = pixels_on(world.device, batch.pixels)
        if any(plan):
            pixels = mix_pixels(pixels, frames, grids, plan)
        features = distillation.features(index, pixels) if distillation else None
        output = engine(pixels, batch.frames, batch.grid_thw, bool(distillation), dropped)
        targets = _targets(batch, own, plan, classes, world.device)
        loss = class_loss(output.logits, targets, wanted.label_smoothing) / max(labelled, 1)
        total += loss.detach().double()
        loss = settings.contrastive_weight * loss
        loss = nan_if_not_finite(loss)
        engine.backward(loss + distillation.loss(output.distilled, features) if distillation else loss)
        engine.step(_report(total, distillation, world) if index == len(batches) - 1 else None)
    mean, *sums = engine.reported
    if not engine.updated:
        raise NotFiniteError(not_finite(mean, settings.lr), items)
    norm = engine.grad_norm
    if not math.isfinite(norm):
        raise DivergedError(not_finite(mean, settings.lr))
    distilled = distillation.result(sums) if distillation else NO_DISTILLATION
    return StepResult(
        loss=settings.contrastive_weight * mean + distilled.loss,
        items=items,
        grad_norm=norm,
        losses={"classification": mean, **distilled.losses},
        agreement=distilled.agreement,
    )


def _report(total: torch.Tensor, distillation: Distillation | None, world: World) -> torch.Tensor:
    """Returns the numbers over all ranks that the result of the step has: the loss, and sums of distillation.

    They are read with the gradient's norm. The host waits for the device there and for the numbers of items."""
    loss = gather_tensor(total.reshape(1), world).sum(0)
    return torch.cat([loss, distillation.totals()]) if distillation else loss


def _rows(batch: LabelledBatch, classes: ClassList) -> list[int]:
    """Returns the class of each item, -1 without a label of `classes`."""
    found = [classes.row(name, label) for name, label in zip(batch.sets, batch.labels, strict=True)]
    return [-1 if row is None else row for row in found]


def _targets(
    batch: LabelledBatch, rows: Sequence[int], plan: Sequence[Mix | None], classes: ClassList, device: torch.device
) -> Targets:
    second = [row if mix is None else rows[mix.partner] for row, mix in zip(rows, plan, strict=True)]
    spans = [classes.spans.get(name, (0, 0)) for name in batch.sets]
    numbers = torch.tensor([rows, second, [begin for begin, _ in spans], [end for _, end in spans]], dtype=torch.int64)
    first, second, begin, end = to_device(numbers, device).unbind()
    shares = torch.tensor([1.0 if mix is None else mix.share for mix in plan], dtype=torch.float32)
    return Targets(first, second, to_device(shares, device), begin, end)
