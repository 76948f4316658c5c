"""What a training step drops: tokens (patch dropout, arXiv:2212.00794) and, for single items, branches of a block
(stochastic depth, arXiv:1603.09382).

A pack may run twice in a step and its blocks more often, on any number of ranks, before or after a resume, and must
drop the same every time. So no forward pass draws random numbers: what a pack drops is drawn before, on the host, from
the seed, the step, the lane and the item alone.
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
    """What one pack of N items drops. The tensors are on the host."""

    lengths: tuple[int, ...]
    """Number of tokens of each item that stay."""
    kept: Tensor | None
    """(Tk,) int64, ascending: the tokens that stay; None: all."""
    factors: Tensor | None
    """(blocks, 2, N) float32: factors of the attention and feed-forward branches of a block for each item; None: all
    1."""

    def token_factors(self, device: torch.device) -> Tensor | None:
        """`factors` for the tokens that stay, (blocks, 2, Tk, 1) on `device`."""
        if self.factors is None:
            return None
        items = torch.repeat_interleave(torch.tensor(self.lengths, dtype=torch.int64))
        return to_device(self.factors, device).index_select(2, to_device(items, device))[..., None]


@dataclass(frozen=True)
class DropConfig:
    """The rule of one step.

    `patches`: share of an item's tokens that is dropped. `depth`: the probability that the last block skips a branch
    for an item; it decreases linearly to 0 at the first block. `merge`: tokens are dropped in blocks of merge x merge.
    """

    patches: float = 0.0
    depth: float = 0.0
    blocks: int = 0
    merge: int = 1
    seed: int = 0
    step: int = 0

    @classmethod
    def of(cls, stage: StageConfig, encoder: EncoderConfig, *, seed: int, step: int) -> DropConfig:
        """The rule of a step of a run, counted from the beginning of the run."""
        shape = encoder.num_hidden_layers, encoder.spatial_merge_size
        return cls(stage.patch_dropout, stage.stochastic_depth, *shape, seed, step)

    def kept(self, tokens: int) -> int:
        """The number of an item's tokens that stay: whole merge blocks, at least one."""
        cell = self.merge**2
        return max(1, round(tokens // cell * (1 - self.patches))) * cell

    def of_pack(self, grids: Sequence[Sequence[int]], lane: int) -> DropPlan | None:
        """What the pack of a lane drops; None: nothing. `grids`: (t, h, w) of each item."""
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
