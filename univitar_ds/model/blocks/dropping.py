"""Plans what a training step drops: tokens (patch dropout, arXiv:2212.00794) and branches of blocks per item
(stochastic depth, arXiv:1603.09382).

A step may run a pack twice and recompute its blocks, and a resumed run may repeat the step on another number of ranks.
Each time the same parts must be dropped, so no forward pass draws random numbers. The plan of a pack is drawn on the
host before the step, and depends only on seed, step, lane and item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import cumulative, token_count
from univitar_ds.model.transfer import to_device
from univitar_ds.randomness import draws

if TYPE_CHECKING:  # needs pydantic, which the encoder alone does not need
    from univitar_ds.config.stage import StageConfig


@dataclass(frozen=True)
class DropPlan:
    """The dropped parts of one pack of N items. The tensors are on the host."""

    lengths: tuple[int, ...]
    """Number of remaining tokens of each item."""
    kept: Tensor | None
    """(Tk,) int64, ascending indices of the remaining tokens; None: all tokens."""
    factors: Tensor | None
    """(blocks, 2, N) float32, factors of the attention and feed-forward branches for each item; None: all are 1."""

    def token_factors(self, device: torch.device) -> Tensor | None:
        """Returns `factors` of the remaining tokens, (blocks, 2, Tk, 1) on `device`; None: all are 1."""
        if self.factors is None:
            return None
        items = torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))
        return to_device(self.factors, device).index_select(2, to_device(items, device))[..., None]


@dataclass(frozen=True)
class DropConfig:
    """Rates and random key of the dropping in one step.

    `patches`: share of an item's tokens that is dropped. `depth`: probability that the last block skips a branch for an
    item; decreases linearly to 0 at the first block. `blocks`: number of encoder blocks. `merge`: tokens are dropped in
    groups of merge x merge.
    """

    patches: float = 0.0
    depth: float = 0.0
    blocks: int = 0
    merge: int = 1
    seed: int = 0
    step: int = 0

    @classmethod
    def of(cls, stage: StageConfig, encoder: EncoderConfig, *, seed: int, step: int) -> DropConfig:
        """Returns the settings of a step of the run. `step` counts from the beginning of the run."""
        shape = encoder.num_hidden_layers, encoder.spatial_merge_size
        return cls(stage.patch_dropout, stage.stochastic_depth, *shape, seed, step)

    def kept(self, tokens: int) -> int:
        """Returns the number of remaining tokens of an item with `tokens` tokens: whole merge groups, at least one."""
        cell = self.merge**2
        return max(1, round(tokens // cell * (1 - self.patches))) * cell

    def of_pack(self, grids: Sequence[Sequence[int]], lane: int) -> DropPlan | None:
        """Returns the plan for the pack of a lane; None: nothing is dropped. `grids`: (t, h, w) of each item."""
        if not self.patches and not self.depth:
            return None
        counts = [token_count(grid) for grid in grids]
        return DropPlan(
            tuple(self.kept(count) for count in counts),
            self._kept_tokens(counts, lane) if self.patches else None,
            self._factors(len(grids), lane) if self.depth else None,
        )

    def _kept_tokens(self, counts: Sequence[int], lane: int) -> Tensor:
        cell = self.merge**2
        kept = [np.empty(0, dtype=np.int64)]
        for item, (start, count) in enumerate(zip(cumulative(counts), counts, strict=False)):
            order = np.argsort(draws(count // cell, self.seed, "patches", self.step, lane, item), kind="stable")
            cells = np.sort(order[: self.kept(count) // cell])
            kept.append((start + cells[:, None] * cell + np.arange(cell)).reshape(-1))
        return torch.from_numpy(np.concatenate(kept))

    def _factors(self, items: int, lane: int) -> Tensor:
        rates = self.depth * np.arange(self.blocks) / max(self.blocks - 1, 1)
        numbers = np.empty((items, self.blocks, 2))
        for item in range(items):
            drawn = draws(2 * self.blocks, self.seed, "depth", self.step, lane, item)
            numbers[item] = (drawn / 2.0**64).reshape(self.blocks, 2)
        stays = numbers.transpose(1, 2, 0) >= rates[:, None, None]
        return torch.from_numpy((stays / (1 - rates)[:, None, None]).astype(np.float32))


NO_DROPPING = DropConfig()
