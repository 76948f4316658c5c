"""The distillation loss of one step, over all packs and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from univitar_ds.config.model import TeacherConfig
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.distill_heads import Distilled
from univitar_ds.model.teacher.teacher import Teacher, TeacherFeatures
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.distill import distill
from univitar_ds.training.step.counts import TeacherCounts
from univitar_ds.training.step.guard import nan_if_not_finite
from univitar_ds.training.step.pack_share import own_drops, own_pixels


class Images(Protocol):
    """The fields of a pack that a teacher reads."""

    pixels: Tensor
    frames: Tensor
    grid_thw: Tensor


@dataclass(frozen=True)
class DistillResult:
    """The distillation result of a step, the same on every rank.

    `loss` is the weighted distillation loss, which is one term of the step's loss. `losses` are its parts, as means
    without weights. `agreement` is the mean cosine similarity of the patch features, None without a teacher.
    """

    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None


NO_DISTILLATION = DistillResult()


class Distillation:
    """Computes the distillation loss of one step, pack by pack, and its result.

    Each pack's sum is divided by the tokens and items of all packs and ranks, `counts`. Every rank creates a
    `Distillation` and calls the same methods in the same order.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: TeacherConfig,
        weight: float,
        packs: Sequence[Images],
        drops: Sequence[DropPlan | None],
        counts: TeacherCounts,
    ) -> None:
        self.teacher, self.config, self.packs, self.counts = teacher, config, packs, counts
        self.drops = [own_drops(pack, dropped) for pack, dropped in zip(packs, drops, strict=True)]
        self.patch_weight, self.pooled_weight = weight * config.patch_weight, weight * config.pooled_weight
        self.sums = torch.zeros(3, dtype=torch.float64, device=teacher.device)
        """Patch loss, pooled loss and agreement of this rank's packs so far."""

    def features(self, index: int, device_pixels: Tensor | None = None) -> TeacherFeatures:
        """Runs the teacher on a whole pack. Returns the features of the tokens that the student encodes, and the pooled
        features of all items.

        Called before the student's forward pass with gradients, so that the memory of the teacher's pass is free then.

        Args: device_pixels: the pack's pixels if they are already on the device; otherwise the teacher copies them.
        """
        pack, dropped = self.packs[index], self.drops[index]
        if device_pixels is not None:
            device_pixels = own_pixels(pack, device_pixels)
        features = self.teacher(
            pack.pixels,
            pack.frames,
            pack.grid_thw,
            min_forwards=self.counts.forwards[index],
            device_pixels=device_pixels,
        )
        if dropped is None or dropped.kept is None:
            return features
        kept = to_device(dropped.kept, features.patches.device)
        return features._replace(patches=features.patches[kept], valid=features.valid[kept])

    def loss(self, student: Distilled, teacher: TeacherFeatures) -> Tensor:
        """Returns a pack's term of the step's loss, a scalar, and adds the pack to `sums`.

        If the term is not finite, its gradient is not finite either."""
        patch, agreement = distill(student.patches, teacher.patches, teacher.valid, self.config.patch_loss)
        pooled, _ = distill(student.pooled, teacher.pooled, teacher.supported, self.config.pooled_loss)
        self.sums += torch.stack((patch.detach(), pooled.detach(), agreement)).double()
        counts = self.counts
        return nan_if_not_finite(self.patch_weight / counts.tokens * patch + self.pooled_weight / counts.items * pooled)

    def result(self, totals: Sequence[float]) -> DistillResult:
        """Returns the result of the step. Args: totals: `sums` added over all ranks, on the host."""
        patch, pooled, agreement = totals
        patch, pooled = patch / self.counts.tokens, pooled / self.counts.items
        return DistillResult(
            self.patch_weight * patch + self.pooled_weight * pooled,
            {"distill_patch": patch, "distill_pooled": pooled},
            agreement / self.counts.tokens,
        )
