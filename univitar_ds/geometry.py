"""Integer arithmetic of native resolution: sizes and grids of items (images and videos).

Symbols in shapes throughout the project
    T tokens of a pack      N items of a pack     D hidden width     H heads       K head width
    P patch values (1176)   F feed-forward width  L lanes            E joint width of the two towers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PATCH = 14
"""Side of a patch in pixels, as in the public release of UniViTAR."""
TUBELET = 2
"""Frames per token, as in the public release. An image is used as both frames of its tokens."""
Modality = Literal["image", "video"]
"""Modality of an item, or of a pack: all items of a pack have the same modality."""
MODALITIES: tuple[Modality, ...] = ("image", "video")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns the size rounded to multiples of `factor`, and scaled if its area would be outside of the limits.

    A size with a side below `factor` is enlarged first. Scaling down rounds both sides down, and scaling up rounds them
    up, so the area may miss the other limit if the two limits are close to each other.

    Gives the same size as the public release, unless the release returns a side of 0 (extreme aspect ratios). Then each
    side is at least `factor`, and the longer side is reduced so that the area is at most `max_pixels`.

    Args: height, width, factor: in pixels; min_pixels, max_pixels: limits of the area of one frame.
    Returns: (height, width) in pixels.
    Raises: ValueError if a side or `factor` is below 1, or `max_pixels` is below factor * factor.
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
        cells = max_pixels // (factor * factor)  # the release lacks these limits and may return a side of 0
        rows = min(max(rows, 1), cells)
        columns = min(max(columns, 1), cells // rows)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
    return rows * factor, columns * factor


@dataclass(frozen=True)
class Resolution:
    """Rule for the size to which items are resized for the encoder.

    Native (`fixed_px` is None): the aspect ratio is kept up to rounding, sides are divisible by `divisor_px`, and the
    whole item has `min_tokens` to `max_tokens` tokens, see `smart_resize`. Fixed: every frame becomes a square with
    sides of `fixed_px`.
    """

    min_tokens: int
    max_tokens: int
    divisor_px: int = 2 * PATCH
    fixed_px: int | None = None

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """Returns the numbers of tokens along time, height and width of an item of height x width pixels.

        Raises: ValueError if `smart_resize` raises it; never for a fixed size.
        """
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
    """Returns the number of tokens of one item."""
    return math.prod(grid_thw)


def cumulative(lengths: Sequence[int]) -> list[int]:
    """Returns the boundaries of consecutive parts: [0, l0, l0 + l1, ...]."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def item_bytes(grid_thw: Sequence[int], frames: int) -> int:
    """Returns the number of bytes of one item's pixels: `frames` frames of h*14 x w*14 RGB, uint8."""
    _, h, w = grid_thw
    return frames * h * w * PATCH * PATCH * 3


def pixel_bytes(tokens: float, *, video: bool) -> float:
    """Returns the bytes of a pack's pixels (uint8). A token is a patch of an image, or of two frames of a video."""
    return tokens * PATCH * PATCH * 3 * (TUBELET if video else 1)
