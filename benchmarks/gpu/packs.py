"""Generates packs like those in training: for each item a grid (t, h, w) and its number of stored frames."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

FRAME_BYTES = 14 * 14 * 3
"""Bytes of the pixels that one token covers in one frame."""
Grid = tuple[int, int, int]
MAX_IMAGE_TOKENS, SIZE_RATIO = 4096, 64
"""Tokens of the largest image, and the ratio of the largest to the smallest image; sizes are drawn log-uniformly."""


def mixed_images(tokens: int, seed: int = 0) -> list[Grid]:
    """Returns images with aspect ratios up to about 2:1 and exactly `tokens` tokens in total.

    Sizes range from about limit / 64 to limit tokens, where limit is the smaller of 4096 and a quarter of `tokens`. The
    last images take the remaining tokens and may be smaller."""
    rng = random.Random(seed)
    limit = max(1, min(MAX_IMAGE_TOKENS, tokens // 4))
    grids: list[Grid] = []
    left = tokens
    while left:
        size, aspect = limit / SIZE_RATIO ** rng.random(), 2 ** rng.uniform(-1, 1)
        h, w = max(1, round(math.sqrt(size * aspect))), max(1, round(math.sqrt(size / aspect)))
        if h * w > min(left, limit):
            h = math.isqrt(min(left, limit))
            w = min(left, limit) // h
        grids.append((1, h, w))
        left -= h * w
    return grids


def equal_images(tokens: int, length: int) -> list[Grid]:
    """Returns tokens // length images (at least one) of `length` tokens each, as square as possible."""
    return [(1, *nearest_to_square(length))] * max(1, tokens // length)


def videos(tokens: int, seed: int = 0) -> list[Grid]:
    """Returns videos of 2, 4, 6 or 8 steps with 16 to 256 tokens per step and exactly `tokens` tokens in total.

    `tokens` must be even: the last video has two steps, each with half of the remaining tokens."""
    rng = random.Random(seed)
    grids: list[Grid] = []
    left = tokens
    while left:
        t, h, w = 2 * rng.randint(1, 4), rng.randint(4, 16), rng.randint(4, 16)
        if t * h * w > left:
            t, (h, w) = 2, nearest_to_square(left // 2)
        grids.append((t, h, w))
        left -= t * h * w
    return grids


def nearest_to_square(tokens: int) -> tuple[int, int]:
    """Returns the divisors h <= w with h * w = `tokens` that are nearest to each other."""
    h = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return h, tokens // h


def frames_of(grids: Sequence[Grid]) -> list[int]:
    """Returns the number of stored frames per item: one for a still image, two for every step of a video."""
    return [1 if t == 1 else 2 * t for t, _, _ in grids]


def pixel_bytes(grids: Sequence[Grid]) -> int:
    """Returns the bytes of the stored frames of all items."""
    return sum(count * h * w * FRAME_BYTES for count, (_, h, w) in zip(frames_of(grids), grids, strict=True))


def padded_batches(grids: Sequence[Grid], max_tokens: int) -> list[list[Grid]]:
    """Pads all items to the longest item. A batch has at most `max_tokens` tokens including padding, but at least one
    item."""
    longest = max(grids, key=math.prod)
    size = max(1, max_tokens // math.prod(longest))
    return [[longest] * len(grids[start : start + size]) for start in range(0, len(grids), size)]
