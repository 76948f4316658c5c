"""Sequence parallelism: the tokens of a pack are split over a group of ranks (Ulysses, arXiv:2309.14509).

Each rank embeds an equal share of a pack's tokens and computes everything but attention for them. Attention needs whole
items: before it an all-to-all gives each rank all tokens of its share of the heads, and one after it the tokens of its
share back. Shares may begin and end within an item, so a pack may consist of one item that no GPU could hold alone.

After the last block, all tokens of an item go to the item's owner: the rank that had its middle token. The owner
computes pooling, caption and loss of the item. So after the encoder each rank of a group works on items of its own, and
gradients of weights are summed over all ranks, as without sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from univitar_ds.geometry import cumulative, item_bytes, token_count
from univitar_ds.model.blocks.attention import CuSeqlens, attention
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.blocks.rank_group import RankGroup, exchange_rows
from univitar_ds.model.transfer import to_device

Range = tuple[int, int]
"""Begin and end (exclusive) of consecutive tokens, items or bytes."""


@dataclass(frozen=True, kw_only=True)
class SplitSpans(CuSeqlens):
    """Boundaries of the items of a pack whose tokens are split over a group. `shares`: tokens of each rank."""

    group: RankGroup
    shares: tuple[int, ...]


def owned_items(grids: Sequence[Sequence[int]], ranks: int) -> list[Range]:
    """Returns the items that each rank of a group owns, from their grids (t, h, w); some ranks may own none."""
    ends = cumulative([token_count(grid) for grid in grids])
    owners = [(begin + end) * ranks // (2 * ends[-1]) for begin, end in pairwise(ends)]
    counts = cumulative([owners.count(rank) for rank in range(ranks)])
    return list(pairwise(counts))


def split_attention(q: Tensor, k: Tensor, v: Tensor, spans: SplitSpans, backend: str) -> Tensor:
    """Computes softmax attention within the items of a split pack.

    Args: q, k, v: (t, H, K) of this rank's tokens; backend: see `choose_backend`. The ranks of the group divide H.
    Returns: (t, H * K) of this rank's tokens.
    """
    group, shares = spans.group, spans.shares
    tokens, heads, width = q.shape
    own = heads // group.size
    by_rank = torch.stack((q, k, v), 1).unflatten(2, (group.size, own)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    whole = exchange_rows(by_rank.flatten(1), [tokens] * group.size, shares, group).view(-1, 3, own, width)
    mixed = attention(*whole.unbind(1), spans, spans, backend)
    back = exchange_rows(mixed, shares, [tokens] * group.size, group)
    return back.view(group.size, tokens, own * width).transpose(0, 1).reshape(tokens, heads * width)


@dataclass(frozen=True)
class SplitPack:
    """This rank's part of a pack. `lengths`: remaining tokens of each item of the pack; `tokens`: this rank's range
    of them; `items`: the range of items that it owns; `kept`: see `DropPlan`."""

    grids: Sequence[Sequence[int]]
    lengths: Sequence[int]
    kept: Tensor | None
    group: RankGroup

    @classmethod
    def of(cls, grids: Sequence[Sequence[int]], drops: DropPlan | None, group: RankGroup) -> SplitPack:
        lengths = [token_count(grid) for grid in grids] if drops is None else drops.lengths
        return cls(grids, lengths, None if drops is None else drops.kept, group)

    @cached_property
    def _bounds(self) -> list[int]:
        """The first token of each rank, and the end of the last rank's tokens."""
        total, ranks = sum(self.lengths), self.group.size
        return [total * rank // ranks for rank in range(ranks + 1)]

    @property
    def tokens(self) -> Range:
        return self._bounds[self.group.rank], self._bounds[self.group.rank + 1]

    @property
    def items(self) -> Range:
        return owned_items(self.grids, self.group.size)[self.group.rank]

    def spans(self, device: torch.device) -> SplitSpans:
        whole = CuSeqlens.of(self.lengths, device)
        shares = tuple(end - begin for begin, end in pairwise(self._bounds))
        return SplitSpans(whole.lengths, whole.cu_seqlens, group=self.group, shares=shares)

    def patches(
        self, patches: Tensor, frames: Sequence[int] | None
    ) -> tuple[Tensor, Sequence[int] | None, list[list[int]]]:
        """Returns the inputs of the patch embedding for the time steps with this rank's tokens: parts of `patches`, of
        `frames` and of the grids. Args: patches, frames: of the whole pack, see `UniViTAR.forward`."""
        steps = self._steps(frames)
        first, last = (steps[0], steps[-1]) if steps else (_NOTHING, _NOTHING)
        if frames is None:
            return patches[first.tokens[0] : last.tokens[1]], None, []
        pixels = patches[first.bytes[0] : last.bytes[1]]
        return pixels, [step.frames for step in steps], [step.grid for step in steps]

    def own(self, embedded: Tensor) -> Tensor:
        """Returns this rank's tokens (t, D). Args: embedded: the patch embedding of the result of `patches`."""
        steps, tokens = self._steps(None), self.indices
        return embedded.index_select(0, to_device(tokens - (steps[0].tokens[0] if steps else 0), embedded.device))

    def to_owners(self, tokens: Tensor) -> Tensor:
        """Returns the tokens of the items that this rank owns, (T, D). Args: tokens: (t, D) of this rank's range."""
        ends = cumulative(self.lengths)
        owned = [(ends[first], ends[end]) for first, end in owned_items(self.grids, self.group.size)]
        ranges = list(pairwise(self._bounds))
        sent = [_common(self.tokens, other) for other in owned]
        received = [_common(other, owned[self.group.rank]) for other in ranges]
        return exchange_rows(tokens, sent, received, self.group)

    @cached_property
    def indices(self) -> Tensor:
        """Which tokens of the whole pack this rank has, (t,) int64, ascending."""
        begin, end = self.tokens
        return torch.arange(begin, end) if self.kept is None else self.kept[begin:end]

    def _steps(self, frames: Sequence[int] | None) -> list[_TimeStep]:
        """Returns the time steps from this rank's first token to its last token."""
        if not len(self.indices):
            return []
        first, last = int(self.indices[0]), int(self.indices[-1])
        return [step for step in _time_steps(self.grids, frames) if step.tokens[0] <= last and step.tokens[1] > first]


@dataclass(frozen=True)
class _TimeStep:
    tokens: Range
    bytes: Range
    frames: int
    grid: list[int]


_NOTHING = _TimeStep((0, 0), (0, 0), 0, [])


def _time_steps(grids: Sequence[Sequence[int]], frames: Sequence[int] | None) -> Iterator[_TimeStep]:
    """Yields the time steps of all items with the ranges of their tokens and pixels.

    The patch embedding can treat each step as an item, since no patch has pixels of two steps."""
    token = byte = 0
    for index, (t, h, w) in enumerate(grids):
        each = 1 if frames is None else int(frames[index]) // t
        size = item_bytes((1, h, w), each)
        for _ in range(t):
            yield _TimeStep((token, token + h * w), (byte, byte + size), each, [1, h, w])
            token, byte = token + h * w, byte + size


def _common(one: Range, other: Range) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
