"""One optimizer update over one pack from every lane, for any number of ranks (GradCache, arXiv:2101.06983).

The loss compares all items of the step, but a rank has memory for the activations of one pack. So the
packs are embedded without gradient, the loss gives the gradient of every embedding, and then each pack
runs again with gradient and is backpropagated with the gradient of its embeddings. A rank with a single pack
runs it once. Both ways give the same numbers because the model draws no random numbers: dropped tokens and
branches are drawn before (`model.dropping`).
The distillation loss is a sum over tokens and items: it is computed in the passes with gradient, pack by pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.errors import UserError
from univitar_ds.model.dropping import NO_DROPPING, DropConfig, DropPlan
from univitar_ds.model.teacher.teacher import Teacher
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.ring import ContrastiveResult, Ring
from univitar_ds.objectives.sigmoid import ring_sigmoid
from univitar_ds.objectives.softmax import ring_softmax
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.step.distillation import NO_DISTILLATION, Distillation

LOSSES = {"sigmoid": ring_sigmoid, "softmax": ring_softmax}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""The first of the model's outputs: `model.contrastive.Embedded` without the features for a teacher."""


class Batch(Protocol):
    """The fields of a pack that a step reads; `data.batch.PackedBatch` has them."""

    pixels: Tensor
    frames: Tensor
    grid_thw: Tensor
    token_ids: Tensor
    text_lengths: Tensor
    caption_ids: Tensor
    lane: int


class DivergedError(UserError):
    """A loss or gradient that is not finite, or a spike; the same on all ranks."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same numbers on every rank.

    `loss` is the training loss. `losses` are its parts: contrastive and, with a teacher, distill_patch and
    distill_pooled, means before their weights; then `agreement` is the mean cosine similarity of the teacher's
    patch features and the student's.
    """

    loss: float
    items: int
    grad_norm: float
    logit_scale: float
    logit_bias: float
    losses: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step: learning rate, weights of the losses, what the encoder drops (by lane, on any rank), and
    whether the gradient's parts are read (`Engine.zero_grad`).

    With `single_pass` a rank that has one pack runs it once.
    """

    lr: float
    contrastive_weight: float = 1.0
    distill_weight: float = 0.0
    dropping: DropConfig = NO_DROPPING
    read_gradient: bool = False
    single_pass: bool = True


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    settings: StepSettings,
    objective: ObjectiveConfig,
    teacher: Teacher | None = None,
) -> StepResult:
    """Updates the parameters once. `batches` are the packs of this rank's lanes, the same number on all ranks.

    Args: teacher: of `objective.teacher`; neither it nor its heads run at a `distill_weight` of 0.
    Raises: DivergedError, on all ranks, if the loss or the gradient is not finite; the parameters keep
    their last finite values.
    """
    engine.zero_grad(settings.lr, read_gradient=settings.read_gradient)
    drops = [settings.dropping.of_pack(batch.grid_thw.tolist(), batch.lane) for batch in batches]
    distillation = None
    if settings.distill_weight:
        distillation = Distillation(teacher, objective.teacher, settings.distill_weight, batches, drops, engine.world)
    inputs = [
        _inputs(batch, engine.world.device, bool(distillation), dropped)
        for batch, dropped in zip(batches, drops, strict=True)
    ]
    caption_ids = to_device(torch.cat([batch.caption_ids for batch in batches]), engine.world.device)
    ring = Ring(len(caption_ids), engine.world.device)  # ranks exchange their numbers of items while they embed
    once = settings.single_pass and len(batches) == 1
    with torch.set_grad_enabled(once):  # features for a teacher are large: kept only for a single pack
        outputs = [output if once else output[:4] for output in (engine(*pack) for pack in inputs)]
    result = _contrastive(outputs, caption_ids, ring, objective)
    if not math.isfinite(result.loss):
        raise DivergedError(f"the loss is {result.loss} at learning rate {settings.lr:g}")
    counts = [len(batch.caption_ids) for batch in batches]
    gradients = zip(result.vision_grad.split(counts), result.text_grad.split(counts), strict=True)
    for index, (pack, wanted) in enumerate(zip(inputs, gradients, strict=True)):
        seen = distillation.features(index, pack[0]) if distillation else None
        output = outputs[0] if once else engine(*pack)
        loss = settings.contrastive_weight * _surrogate(output[:4], *wanted, result, len(batches))
        engine.backward(loss + distillation.loss(output[4], seen) if distillation else loss)
        engine.step()
    norm = engine.grad_norm
    if not engine.updated or not math.isfinite(norm):
        raise DivergedError(f"the gradient is not finite at loss {result.loss:.6g} and learning rate {settings.lr:g}")
    added = distillation.result() if distillation else NO_DISTILLATION
    return StepResult(
        loss=settings.contrastive_weight * result.loss + added.loss,
        items=result.items,
        grad_norm=norm,
        logit_scale=float(outputs[0][2].detach()),
        logit_bias=float(outputs[0][3].detach()),
        losses={"contrastive": result.loss, **added.losses},
        agreement=added.agreement,
    )


def _contrastive(
    outputs: Sequence[Sequence[Tensor]], caption_ids: Tensor, ring: Ring, objective: ObjectiveConfig
) -> ContrastiveResult:
    """Loss and gradients of the embeddings over all items of the step, of all ranks."""
    return LOSSES[objective.kind](
        torch.cat([output[0].detach() for output in outputs]),
        torch.cat([output[1].detach() for output in outputs]),
        outputs[0][2].detach(),
        outputs[0][3].detach(),
        caption_ids,
        chunk=objective.chunk,
        same_caption_positive=objective.same_caption_positive,
        ring=ring,
    )


def _inputs(batch: Batch, device: torch.device, distill: bool, drops: DropPlan | None) -> tuple[Any, ...]:
    """Arguments of the model's forward. `frames` and `grid_thw` stay on the host: they are sizes."""
    pack = (
        batch.pixels.to(device, non_blocking=True),
        batch.frames,
        batch.grid_thw,
        batch.token_ids.to(device, non_blocking=True),
        batch.text_lengths.to(device, non_blocking=True),
    )
    return (*pack, distill, drops) if distill or drops is not None else pack


def _surrogate(
    output: Outputs, vision_grad: Tensor, text_grad: Tensor, result: ContrastiveResult, packs: int
) -> Tensor:
    """A scalar with the gradient of the loss: the sum of each output times its gradient.

    Scale and bias are outputs of every pack, each of which gets its share of the rank's gradient.
    """
    vision, text, scale, bias = output
    shared = (scale * result.scale_grad).sum() + (bias * result.bias_grad).sum()
    return (vision * vision_grad).sum() + (text * text_grad).sum() + shared / packs
