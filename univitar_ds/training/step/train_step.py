"""One optimizer update over one pack from every lane, for any number of ranks (GradCache, arXiv:2101.06983).

The loss compares all items of the step, but a rank has memory for the activations of a few packs only. The packs are
first embedded, and the loss gives the gradient of every embedding. The gradient of a pack's embeddings is then
backpropagated through the pack's graph. `StepSettings.keep` packs keep their graph from the first pass; the others are
embedded without gradient and run again. Packs that run once and packs that run twice give the same numbers, because the
model draws no random numbers: dropped tokens and branches are drawn before the passes (`model.blocks.dropping`). The
distillation loss is a sum over tokens and items, and is computed pack by pack in the passes with gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.errors import UserError
from univitar_ds.model.blocks.dropping import NO_DROPPING, DropConfig, DropPlan
from univitar_ds.model.teacher.teacher import Teacher, TeacherFeatures
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.exchange import ContrastiveResult, Exchange
from univitar_ds.objectives.pairs import PairGradients, loss_of_pairs, pair_losses
from univitar_ds.objectives.sigmoid import sigmoid_loss
from univitar_ds.objectives.softmax import softmax_loss
from univitar_ds.plugins import calling, objective_named
from univitar_ds.training.distributed.process_group import gather_numbers
from univitar_ds.training.engine.backward_hooks import HookCounts
from univitar_ds.training.engine.engine import Engine
from univitar_ds.training.step.counts import Gather, StepCounts, agreed, alone, exchanged, own_counts
from univitar_ds.training.step.distillation import NO_DISTILLATION, Distillation
from univitar_ds.training.step.pack_share import whole_of
from univitar_ds.training.step.upload import pixels_on

LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""The first four outputs of the model: `model.contrastive.Embedded` without the features for a teacher."""


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
    """Raised on all ranks if a step has changed the parameters and must be undone, or if a step must be undone and the
    limit of rollbacks is reached."""

    all_ranks_know = True


class NotFiniteError(DivergedError):
    """Raised on all ranks if the loss or the gradient of a step is not finite.

    The update was skipped on all ranks: parameters, moments, the average of the weights and Adam's step are unchanged.
    `items` is the number of items of the step over all ranks. `suspects` are the positions, in the order of the packs,
    of this rank's items whose embeddings are not finite.
    """

    def __init__(self, message: str, items: int, suspects: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.items, self.suspects = items, tuple(suspects)


@dataclass(frozen=True)
class StepResult:
    """The numbers that a step reports, the same on every rank.

    `loss` is the training loss. `losses` are the parts of the loss, as means without weights: contrastive or
    classification and, with a teacher, distill_patch and distill_pooled. `logit_scale` and `logit_bias` are None
    without a text tower. `agreement` is the mean cosine similarity of the teacher's and the student's patch features,
    None without a teacher.
    """

    loss: float
    items: int
    grad_norm: float
    logit_scale: float | None = None
    logit_bias: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None


@dataclass(frozen=True)
class StepSettings:
    """Settings of a step.

    `lr` is the learning rate of the stage, and `dropping` determines the tokens and branches that the encoder drops.
    With `read_gradient` the norms of the gradient's parts are computed (`Engine.zero_grad`). `keep` packs of a rank run
    only once, and their activations are in memory at the same time; it does not change results, and is the same on all
    ranks.
    """

    lr: float
    contrastive_weight: float = 1.0
    distill_weight: float = 0.0
    dropping: DropConfig = NO_DROPPING
    read_gradient: bool = False
    keep: int = 1


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    settings: StepSettings,
    objective: ObjectiveConfig,
    teacher: Teacher | None = None,
    counts: StepCounts | None = None,
    gather: Gather | None = None,
) -> StepResult:
    """Updates the parameters once. All ranks call it.

    Args:
        batches: the packs of this rank's lanes, the same number on all ranks.
        teacher: that of `objective.teacher`. With a `distill_weight` of 0 neither the teacher nor its heads run.
        counts: of the data-parallel ranks; None: the step exchanges them.
        gather: sends the step's losses in a message of the caller, once if the parameters were updated; None: the step
            sends a message of its own if it needs one.
    Raises: NotFiniteError on all ranks if the loss or the gradient is not finite and the update was skipped;
        DivergedError if DeepSpeed's configuration has disabled the check and the update was applied.
    """
    engine.zero_grad(settings.lr, read_gradient=settings.read_gradient)
    drops = [settings.dropping.of_pack(whole_of(batch).grid_thw.tolist(), batch.lane) for batch in batches]
    distillation, data = None, engine.groups.data
    if settings.distill_weight:
        counts = counts or exchanged(own_counts(batches, settings.dropping, teacher), data)
        distillation = Distillation(teacher, objective.teacher, settings.distill_weight, batches, drops, counts.teacher)
    inputs = [
        _inputs(batch, engine.world.device, bool(distillation), dropped)
        for batch, dropped in zip(batches, drops, strict=True)
    ]
    caption_ids = to_device(torch.cat([batch.caption_ids for batch in batches]), engine.world.device)
    known = None if counts is None else (to_device(counts.items, engine.world.device), counts.items.tolist())
    # Without `counts`, ranks exchange their numbers of items during the embedding.
    exchange = Exchange(len(caption_ids), data.device, data.group, known=known)
    outputs, graphs = _embed(engine, inputs, settings.keep, distillation)
    result = _contrastive(outputs, caption_ids, exchange, objective)
    # All ranks run the backward passes of every step. A loss that is not finite gets a gradient that is not finite.
    weight = settings.contrastive_weight if math.isfinite(result.loss) else math.nan
    items = [len(batch.caption_ids) for batch in batches]
    gradients = zip(result.vision_grad.split(items), result.text_grad.split(items), strict=True)
    for index, (pack, pack_grads) in enumerate(zip(inputs, gradients, strict=True)):
        graph = graphs.pop(index, None) or _with_graph(engine, index, pack, distillation)
        graph.hooks.restore()
        loss = weight * _surrogate(graph.output[:4], *pack_grads, result, len(batches))
        engine.backward(loss + graph.distill_loss(distillation) if distillation else loss)
        engine.step(_report(outputs[0], distillation) if index == len(inputs) - 1 else None)
        del graph, loss  # before the next pack needs the memory
    if not engine.updated:
        raise NotFiniteError(not_finite(result.loss, settings.lr), result.items, _suspects(outputs))
    if not math.isfinite(engine.grad_norm):
        raise DivergedError(not_finite(result.loss, settings.lr))
    scale, bias, *sums = engine.reported
    send = gather or (partial(gather_numbers, world=data) if sums else alone)
    (contrastive, norm), totals = agreed(send, [result.loss, engine.grad_norm], sums)
    distilled = distillation.result(totals) if distillation else NO_DISTILLATION
    return StepResult(
        loss=settings.contrastive_weight * contrastive + distilled.loss,
        items=result.items,
        grad_norm=norm,
        logit_scale=scale,
        logit_bias=bias,
        losses={"contrastive": contrastive, **distilled.losses},
        agreement=distilled.agreement,
    )


def not_finite(loss: float, lr: float) -> str:
    """Returns a sentence about what is not finite in a step: the loss, or the gradient of a finite loss."""
    if not math.isfinite(loss):
        return f"the loss is {loss} at learning rate {lr:g}"
    return f"the gradient is not finite at loss {loss:.6g} and learning rate {lr:g}"


def _suspects(outputs: Sequence[Sequence[Tensor]]) -> list[int]:
    """Returns the positions of the items whose embeddings are not finite. Synchronizes with the device."""
    finite = [torch.isfinite(vision).all(1) & torch.isfinite(text).all(1) for vision, text, *_ in outputs]
    return (~torch.cat(finite)).cpu().nonzero()[:, 0].tolist()  # the number of rows would be another wait


def encoded_before_first(packs: int) -> int:
    """Returns how many packs of a rank are embedded before its first pack; see `_embed`."""
    return packs - 1


def loss_named(kind: str) -> Callable[..., ContrastiveResult]:
    """Returns the loss of an `objective.kind`, with the arguments of `softmax_loss`.

    Raises: PluginError if no plugin registers it. The loss of a plugin raises PluginError if the plugin's code fails.
    """
    if kind in LOSSES:
        return LOSSES[kind]
    plugin, objective = objective_named(kind)
    of_chunk = pair_losses(objective.loss_of_chunk)

    def loss(*block: Any) -> PairGradients:
        with calling(plugin, f"the objective {kind}"):
            return of_chunk(*block)

    return partial(loss_of_pairs, loss)


@dataclass(frozen=True)
class _Graph:
    """The forward pass of a pack with gradient, and the features of the teacher, computed before it."""

    output: Any
    features: TeacherFeatures | None
    hooks: HookCounts

    def distill_loss(self, distillation: Distillation) -> Tensor:
        return distillation.loss(self.output[4], self.features)


def _with_graph(engine: Engine, index: int, pack: tuple[Any, ...], distillation: Distillation | None) -> _Graph:
    # The teacher comes first, so that the memory of its forward pass is free when the student's activations need it.
    features = distillation.features(index, pack[0]) if distillation else None
    return _Graph(engine(*pack), features, HookCounts.of(engine.module))


def _embed(
    engine: Engine, inputs: Sequence[tuple[Any, ...]], keep: int, distillation: Distillation | None
) -> tuple[list[Outputs], dict[int, _Graph]]:
    """Returns the outputs of all packs without gradient, in their order, and the graphs of the first `keep` packs.

    These packs run last, and the backward passes begin with them. Packs without a graph thus run while no graphs are in
    memory, and the gradients are accumulated in the order of the packs, as without kept graphs.
    """
    outputs: dict[int, Outputs] = {}
    graphs: dict[int, _Graph] = {}
    for index in reversed(range(len(inputs))):
        if index < keep:
            graphs[index] = _with_graph(engine, index, inputs[index], distillation)
            outputs[index] = tuple(output.detach() for output in graphs[index].output[:4])
            continue
        with torch.no_grad():
            outputs[index] = engine(*inputs[index])[:4]  # the features for a teacher are large
    return [outputs[index] for index in range(len(inputs))], graphs


def _contrastive(
    outputs: Sequence[Outputs], caption_ids: Tensor, exchange: Exchange, objective: ObjectiveConfig
) -> ContrastiveResult:
    """Returns the loss over all items of the step on all ranks, and the gradients of this rank's embeddings."""
    return loss_named(objective.kind)(
        torch.cat([output[0] for output in outputs]),
        torch.cat([output[1] for output in outputs]),
        outputs[0][2],
        outputs[0][3],
        caption_ids,
        chunk=objective.chunk,
        same_caption_positive=objective.same_caption_positive,
        exchange=exchange,
    )


def _inputs(batch: Batch, device: torch.device, distill: bool, drops: DropPlan | None) -> tuple[Any, ...]:
    """Returns the arguments of the model's forward. Sizes stay on the host: `frames`, `grid_thw`, lengths."""
    whole = whole_of(batch)
    pack = (
        pixels_on(device, whole.pixels),
        whole.frames,
        whole.grid_thw,
        to_device(batch.token_ids, device),
        batch.text_lengths,
    )
    return (*pack, distill, drops) if distill or drops is not None else pack


def _report(output: Outputs, distillation: Distillation | None) -> Tensor:
    """Returns the numbers of the step's result that are on the device: scale and bias, and this rank's sums of
    distillation.

    They are read together with the gradient's norm. Before, the host waits for the device once: for the loss
    (`Exchange.total`). Without `counts` it also waits for the numbers of items (`Exchange`).
    """
    scale_and_bias = torch.cat([output[2].detach().reshape(1), output[3].detach().reshape(1)]).double()
    return torch.cat([scale_and_bias, distillation.sums]) if distillation else scale_and_bias


def _surrogate(
    output: Outputs, vision_grad: Tensor, text_grad: Tensor, result: ContrastiveResult, packs: int
) -> Tensor:
    """Returns a scalar whose gradient is that of the loss: the sum of each output times the output's gradient.

    Scale and bias are outputs of every pack, and each pack gets an equal share of the rank's gradient.
    """
    vision, text, scale, bias = output
    shared = (scale * result.scale_grad).sum() + (bias * result.bias_grad).sum()
    return (vision * vision_grad).sum() + (text * text_grad).sum() + shared / packs
