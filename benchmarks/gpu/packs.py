"""Packs as training has them, as pure functions: grids (t, h, w) and the frames stored of every item."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

FRAME_BYTES = 14 * 14 * 3
"""Of one frame of a token."""
Grid = tuple[int, int, int]
MOST, SPREAD = 4096, 64
"""Tokens of the largest image, and how many times those of the smallest; drawn log-uniformly between them."""


def mixed_images(tokens: int, seed: int = 0) -> list[Grid]:
    """Images of 64 to 4096 tokens, none above a quarter of the pack, up to 2 : 1; exactly `tokens` in all: the last
    ones are what is left."""
    rng = random.Random(seed)
    most = max(1, min(MOST, tokens // 4))
    grids: list[Grid] = []
    left = tokens
    while left:
        size, aspect = most / SPREAD ** rng.random(), 2 ** rng.uniform(-1, 1)
        h, w = max(1, round(math.sqrt(size * aspect))), max(1, round(math.sqrt(size / aspect)))
        if h * w > min(left, most):
            h = math.isqrt(min(left, most))
            w = min(left, most) // h
        grids.append((1, h, w))
        left -= h * w
    return grids


def equal_images(tokens: int, length: int) -> list[Grid]:
    """As many images of `length` tokens, as square as can be, as fit into `tokens`; at least one."""
    return [(1, *nearest_to_square(length))] * max(1, tokens // length)


def videos(tokens: int, seed: int = 0) -> list[Grid]:
    """Videos of 2, 4, 6 or 8 steps with 16 to 256 tokens each; exactly `tokens` in all, an even number: the last video
    has two steps of what is left."""
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
    """The divisors h <= w of `tokens` that lie nearest to each other."""
    h = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return h, tokens // h


def frames_of(grids: Sequence[Grid]) -> list[int]:
    """Frames stored per item: one of a still image, two for every step of a video."""
    return [1 if t == 1 else 2 * t for t, _, _ in grids]


def pixel_bytes(grids: Sequence[Grid]) -> int:
    """Bytes of the stored frames."""
    return sum(count * h * w * FRAME_BYTES for count, (_, h, w) in zip(frames_of(grids), grids, strict=True))


def padded_batches(grids: Sequence[Grid], most_tokens: int) -> list[list[Grid]]:
    """The same items filled up to the longest of them, in batches of at most `most_tokens` tokens, padding included."""
    longest = max(grids, key=math.prod)
    size = max(1, most_tokens // math.prod(longest))
    return [[longest] * len(grids[start : start + size]) for start in range(0, len(grids), size)]
