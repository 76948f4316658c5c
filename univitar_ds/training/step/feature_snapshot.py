"""Copies of some of the encoder's tokens in a training step, for the images in the logs.

A hook on the encoder of rank 0 copies tokens of the step itself: no additional forward pass or communication is needed,
and the results of the training do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count

MAX_ITEMS, MAX_TOKENS = 8, 8192
"""Maximum number of items and of tokens in a snapshot."""


@dataclass(frozen=True)
class FeatureSnapshot:
    """The encoder's output for the first `items` items of a pack: `tokens` (Tk, D) float32 on the host."""

    items: int
    tokens: Tensor
    kept: Tensor
    """(Tk,) int64: the indices of `tokens` among all tokens of the items. Dropped tokens have no entry."""


@contextmanager
def capture_features(
    vision: nn.Module, batch: PackedBatch | None, *, before: int = 0
) -> Iterator[list[FeatureSnapshot]]:
    """Adds a `FeatureSnapshot` of `batch` to the list that it yields, when `vision` encodes it in the context.

    The list stays empty if the batch is None or has no items.
    Args: before: number of packs that `vision` encodes before this one; 0 in a `classification_step`, and
        `train_step.encoded_before_first` for the first pack of a `train_step`.
    """
    snapshots: list[FeatureSnapshot] = []
    if not batch:
        yield snapshots
        return
    lengths = [token_count(grid) for grid in batch.grid_thw.tolist()]
    items = _fitting_items(lengths)
    encoded = count()

    def copy_some(_: nn.Module, __: Any, keywords: dict[str, Any], output: Tensor) -> None:
        if next(encoded) != before:
            return
        total = sum(lengths[:items])
        kept = getattr(keywords.get("drops"), "kept", None)
        kept = torch.arange(total) if kept is None else kept[kept < total]
        snapshots.append(FeatureSnapshot(items, output[: len(kept)].detach().to("cpu", torch.float32, copy=True), kept))

    handle = vision.register_forward_hook(copy_some, with_kwargs=True)
    try:
        yield snapshots
    finally:
        handle.remove()


def _fitting_items(lengths: Sequence[int]) -> int:
    """Returns the number of items to copy: at most MAX_ITEMS with at most MAX_TOKENS tokens, but at least one item."""
    items = min(len(lengths), MAX_ITEMS)
    while items > 1 and sum(lengths[:items]) > MAX_TOKENS:
        items -= 1
    return items
