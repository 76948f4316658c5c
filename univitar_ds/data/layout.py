"""What an item is in bytes. Free of torch, so that decoding processes start fast and stay small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from univitar_ds.geometry import PATCH

Modality = Literal["image", "video"]
"""A pack holds pictures or clips, never both."""


def item_bytes(grid_thw: Sequence[int], frames: int) -> int:
    """Bytes of one item's uint8 pixels: `frames` frames of h*14 x w*14 RGB."""
    _, h, w = grid_thw
    return frames * h * w * PATCH * PATCH * 3
