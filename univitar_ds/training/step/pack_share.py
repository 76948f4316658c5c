"""A rank's share of a pack that a group of ranks encodes together (`model.blocks.sequence_parallel`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import cumulative, item_bytes
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.blocks.rank_group import RankGroup
from univitar_ds.model.blocks.sequence_parallel import owned_items


@dataclass
class PackShare(PackedBatch):
    """The items of a pack that this rank owns, as a pack of their own for the loss, the teacher and the logs.

    Only the first rank of the group has the loader's counts since the lane's previous pack, such as `bad`.
    """

    whole: PackedBatch | None = None
    """The pack that the group encodes; it is always set."""
    items: tuple[int, int] = (0, 0)
    """The range of items that this rank owns."""
    ranks: int = 1
    """Ranks of the group."""


def share_of(batch: PackedBatch, group: RankGroup) -> PackedBatch:
    """Returns the items of a pack that this rank owns; the pack itself if the group has only this rank."""
    if group.size == 1:
        return batch
    grids = batch.grid_thw.tolist()
    first, end = owned_items(grids, group.size)[group.rank]
    own: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(PackedBatch)}
    for name, value in own.items():
        if len(batch) and isinstance(value, Tensor | list) and len(value) == len(batch) and name != "pixels":
            own[name] = value[first:end]
    begins = cumulative(list(starmap(item_bytes, zip(grids, batch.frames.tolist(), strict=True))))
    own["pixels"] = batch.pixels[begins[first] : begins[end]]
    share = PackShare(**own, whole=batch, items=(first, end), ranks=group.size)
    return share if group.rank == 0 else replace(share, bad={}, downscaled=0, ignored={}, filtered={})


def whole_of(batch: Any) -> Any:
    """Returns the whole pack of a `PackShare`; any other pack is returned as it is."""
    return batch.whole if isinstance(batch, PackShare) else batch


def own_drops(batch: Any, drops: DropPlan | None) -> DropPlan | None:
    """Returns the tokens and branches that are dropped from a rank's own items. Args: drops: of the whole pack."""
    if drops is None or not isinstance(batch, PackShare):
        return drops
    first, end = batch.items
    kept = drops.kept
    if kept is not None:
        tokens = cumulative(batch.whole.grid_thw.prod(1).tolist())
        low, high = torch.searchsorted(kept, torch.tensor([tokens[first], tokens[end]])).tolist()
        kept = kept[low:high] - tokens[first]
    factors = None if drops.factors is None else drops.factors[:, :, first:end]
    return DropPlan(tuple(drops.lengths[first:end]), kept, factors)


def own_pixels(batch: Any, whole: Tensor) -> Tensor:
    """Returns the pixels of a rank's own items. Args: whole: pixels of the whole pack, 1-D."""
    if not isinstance(batch, PackShare):
        return whole
    grids, frames = batch.whole.grid_thw.tolist(), batch.whole.frames.tolist()
    begins = cumulative(list(starmap(item_bytes, zip(grids, frames, strict=True))))
    return whole[begins[batch.items[0]] : begins[batch.items[1]]]


def own_rows(batch: Any, rows: Sequence[Any] | Tensor) -> Any:
    """Returns the rows of a rank's own items. Args: rows: a row for each item of the whole pack."""
    return rows[batch.items[0] : batch.items[1]] if isinstance(batch, PackShare) else rows
