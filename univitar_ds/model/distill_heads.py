"""Heads that map the student's features to the teacher's width. Only training uses them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from univitar_ds.model.blocks.layers import RMSNorm


class Distilled(NamedTuple):
    """Features of a pack in the teacher's width: `patches` (T, Dt), `pooled` (N, Dt)."""

    patches: Tensor
    pooled: Tensor


class DistillHeads(nn.Module):
    """Linear maps for the tokens and the pooled feature.

    The tokens are normed first, because the encoder has no final norm.
    """

    def __init__(self, width: int, teacher_width: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.patches = nn.Linear(width, teacher_width)
        self.pooled = nn.Linear(width, teacher_width)
        for head in (self.patches, self.pooled):
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, tokens: Tensor, pooled: Tensor) -> Distilled:
        """Maps `tokens` (T, D) and `pooled` (N, D) to the teacher's width."""
        return Distilled(self.patches(self.norm(tokens)), self.pooled(pooled))
