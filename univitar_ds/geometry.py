"""Integer arithmetic of native resolution: sizes, grids and positions. No pixels, no devices.

Shape legend of the project
    T tokens of a pack      N items of a pack     D hidden width     H heads       K head width
    P patch values (1176)   F feed-forward width  L lanes            E joint width of the two towers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PATCH = 14
"""Side of a patch in pixels (release)."""
TUBELET = 2
"""Frames per token (release); a still image is its own second frame."""
Modality = Literal["image", "video"]
"""A pack holds images or videos, never both."""


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size nearest to (height, width) with sides divisible by `factor` and an area within the limits.

    Follows the release to the pixel, except where the release returns a side of 0 (extreme aspect ratios):
    there each side keeps at least one `factor` and the longer one is cut so that the area stays within
    `max_pixels`.

    Args: sides and factor in pixels; min_pixels and max_pixels in pixels of one frame.
    Returns: (height, width) in pixels.
    Raises: ValueError if a side or the factor is not positive, or not even one factor x factor fits.
    """
    if min(height, width, factor) < 1:
        raise ValueError(f"sides and factor must be at least 1, got {height} x {width}, factor {factor}")
    if factor * factor > max_pixels:
        raise ValueError(f"max_pixels {max_pixels} holds no {factor} x {factor} square; raise it or lower factor")
    if height < factor:
        height, width = factor, int(factor / height * width) + 1
    if width < factor:
        height, width = int(factor / width * height) + 1, factor
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor * factor
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
        most = max_pixels // (factor * factor)  # the release stops above and may return a side of 0
        rows = min(max(rows, 1), most)
        columns = min(max(columns, 1), most // rows)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


@dataclass(frozen=True)
class Resolution:
    """The size with which an item enters the encoder.

    Native (`fixed_px` None): the aspect ratio is kept, the whole item has between `min_tokens` and
    `max_tokens` tokens. Fixed: every frame becomes a `fixed_px` square. Sides are divisible by `divisor_px`.
    """

    min_tokens: int
    max_tokens: int
    divisor_px: int = 2 * PATCH
    fixed_px: int | None = None

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """Tokens along time, height and width of an item of `frames` frames of height x width pixels."""
        steps = math.ceil(frames / TUBELET)
        if self.fixed_px is not None:
            side = self.fixed_px // PATCH
            return steps, side, side
        cell = PATCH * PATCH
        h, w = smart_resize(
            height, width, self.divisor_px, self.min_tokens * cell // steps, self.max_tokens * cell // steps
        )
        return steps, h // PATCH, w // PATCH


def token_count(grid_thw: Sequence[int]) -> int:
    """Tokens of one item."""
    return math.prod(grid_thw)


def cumulative(lengths: Sequence[int]) -> list[int]:
    """Boundaries of consecutive runs: [0, l0, l0 + l1, ...]."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def item_bytes(grid_thw: Sequence[int], frames: int) -> int:
    """Bytes of one item's uint8 pixels: `frames` frames of h*14 x w*14 RGB."""
    _, h, w = grid_thw
    return frames * h * w * PATCH * PATCH * 3
