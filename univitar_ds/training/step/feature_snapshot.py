"""Some of the encoder's tokens of a training step, for the images in the logs.

The tokens are those of the step itself. A hook on the encoder of rank 0 copies some of them: there is no additional
forward pass or communication, and the results of the training do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count

MOST_ITEMS, MOST_TOKENS = 8, 8192


@dataclass(frozen=True)
class FeatureSnapshot:
    """Tokens of a pack's first items as they left the encoder: (Tk, D) float32 on the host."""

    items: int
    tokens: Tensor
    kept: Tensor
    """(Tk,) int64: the indices of these tokens among all tokens of the items; dropped ones are missing."""


@contextmanager
def capture_features(vision: nn.Module, batch: PackedBatch | None) -> Iterator[list[FeatureSnapshot]]:
    """Inside, the first pack that `vision` encodes, which must be `batch`, adds a `FeatureSnapshot` to the list.

    For None, or a pack without items, the list stays empty.
    """
    snapshots: list[FeatureSnapshot] = []
    if not batch:
        yield snapshots
        return
    lengths = [token_count(grid) for grid in batch.grid_thw.tolist()]
    items = _fitting_items(lengths)

    def copy_some(_: nn.Module, __: Any, keywords: dict[str, Any], output: Tensor) -> None:
        if snapshots:
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
    """The number of first items to show: few, with so few tokens that copying them is cheap."""
    items = min(len(lengths), MOST_ITEMS)
    while items > 1 and sum(lengths[:items]) > MOST_TOKENS:
        items -= 1
    return items
