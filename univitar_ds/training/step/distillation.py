"""The teacher's part of one step, over all packs and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from univitar_ds.config.model import TeacherConfig
from univitar_ds.geometry import token_count
from univitar_ds.model.distill_heads import Distilled
from univitar_ds.model.dropping import DropPlan
from univitar_ds.model.teacher.teacher import Teacher, TeacherFeatures
from univitar_ds.model.transfer import to_device
from univitar_ds.objectives.distill import distill
from univitar_ds.training.distributed.process_group import World, gather_numbers


class Images(Protocol):
    """The input of a teacher."""

    pixels: Tensor
    frames: Tensor
    grid_thw: Tensor


@dataclass(frozen=True)
class DistillResult:
    """The same on every rank: the term that was added to the loss, its parts as means before their weights, and the
    mean cosine similarity of the patch features (None: no teacher)."""

    loss: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    agreement: float | None = None


NO_DISTILLATION = DistillResult()


class Distillation:
    """First counts over all packs, since the sum of each pack is divided by them; then each pack; then the result.

    Every rank creates it, and calls the same methods in the same order.
    """

    def __init__(
        self,
        teacher: Teacher,
        config: TeacherConfig,
        weight: float,
        packs: Sequence[Images],
        drops: Sequence[DropPlan | None],
        world: World,
    ) -> None:
        self.teacher, self.config, self.packs, self.drops, self.world = teacher, config, packs, drops, world
        taken = [
            length
            for pack, dropped in zip(packs, drops, strict=True)
            for length, good in zip(_lengths(pack, dropped), teacher.supports(pack.grid_thw), strict=True)
            if good
        ]
        forwards = [teacher.num_forwards(pack.grid_thw) for pack in packs]
        table = gather_numbers([sum(taken), len(taken), *forwards], world)
        self.tokens, self.items = (max(int(n), 1) for n in table[:, :2].sum(0))
        self.num_forwards = [int(n) for n in table[:, 2:].amax(0)]
        self.patch_weight, self.pooled_weight = weight * config.patch_weight, weight * config.pooled_weight
        self.sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # of patches, of pooled, of agreement

    def features(self, index: int, device_pixels: Tensor | None = None) -> TeacherFeatures:
        """Runs the teacher over a whole pack; features of the tokens that the student sees, and of all items.

        Call it before the student runs, so that the teacher's memory is free again by then.
        Args: device_pixels: the pack's pixels on the device, if they are there already.
        """
        pack, dropped = self.packs[index], self.drops[index]
        seen = self.teacher(
            pack.pixels, pack.frames, pack.grid_thw, min_forwards=self.num_forwards[index], device_pixels=device_pixels
        )
        if dropped is None or dropped.kept is None:
            return seen
        kept = to_device(dropped.kept, seen.patches.device)
        return seen._replace(patches=seen.patches[kept], valid=seen.valid[kept])

    def loss(self, student: Distilled, teacher: TeacherFeatures) -> Tensor:
        """The term of a pack in the loss of the step, ()."""
        patch, agreement = distill(student.patches, teacher.patches, teacher.valid, self.config.patch_loss)
        pooled, _ = distill(student.pooled, teacher.pooled, teacher.supported, self.config.pooled_loss)
        self.sums += torch.stack((patch.detach(), pooled.detach(), agreement)).double()
        return self.patch_weight / self.tokens * patch + self.pooled_weight / self.items * pooled

    def result(self) -> DistillResult:
        """Over all ranks, after the last pack."""
        patch, pooled, agreement = gather_numbers(self.sums.tolist(), self.world).sum(0).tolist()
        patch, pooled = patch / self.tokens, pooled / self.items
        return DistillResult(
            self.patch_weight * patch + self.pooled_weight * pooled,
            {"distill_patch": patch, "distill_pooled": pooled},
            agreement / self.tokens,
        )


def _lengths(pack: Images, dropped: DropPlan | None) -> Sequence[int]:
    """Tokens of each item that the student sees."""
    return [token_count(grid) for grid in pack.grid_thw.tolist()] if dropped is None else dropped.lengths
