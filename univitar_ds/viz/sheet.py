"""Parts of image sheets: patch features as colours, resized images, wrapped captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

FITTED_TOKENS = 4096
"""Most tokens from which principal components are computed."""
DIRECTIONS, ROUNDS = 8, 16


def component_colours(features: Sequence[Tensor]) -> list[Tensor]:
    """The first three principal components over all items, each (T_i, D), as (T_i, 3) uint8 colours."""
    centred = torch.cat(list(features)).float()
    centred -= centred.mean(dim=0)
    basis = _principal(centred[:: -(-len(centred) // FITTED_TOKENS)], 3)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()  # the sign is arbitrary
    values = centred @ basis
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return list((scaled * 255).round().to(torch.uint8).split([len(part) for part in features]))


def _principal(centred: Tensor, count: int) -> Tensor:
    """The first `count` principal directions of rows (n, D), (D, count), by subspace iteration.

    Exact enough for colours, and fast, since training waits for it: at D 1920 an eigendecomposition took 12 times as
    long.
    """
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(centred.shape[1], min(DIRECTIONS, centred.shape[1]), generator=start)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    seen = centred @ basis
    _, vectors = torch.linalg.eigh(seen.T @ seen)
    return basis @ vectors[:, -count:].flip(1)


def raster_order(tokens: Tensor, grid: Sequence[int], merge: int) -> Tensor:
    """Tokens of one item, (t*h*w, D) in the encoder's order of `merge` x `merge` blocks, row by row: (t, h, w, D)."""
    t, h, w = grid
    blocks = tokens.view(t, h // merge, w // merge, merge, merge, -1)
    return blocks.transpose(2, 3).reshape(t, h, w, -1)


def spread_frames(count: int, shown: int) -> list[int]:
    """At most `shown` of the numbers below `count`, evenly spaced from the first to the last."""
    return sorted({round((count - 1) * part / (shown - 1)) for part in range(shown)})


def to_size(pixels: Tensor | np.ndarray, height: int, most_width: int, *, smooth: bool) -> Image.Image:
    """(h, w, 3) uint8 as an image of `height`, or lower if it would be wider than `most_width`; the aspect ratio is
    kept."""
    image = Image.fromarray(np.asarray(pixels))
    scale = min(height / image.height, most_width / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def wrapped(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; text that does not fit ends in three dots."""
    words, found = " ".join(text.split()), []
    while words and len(found) < lines:
        last = len(found) == lines - 1
        fits = _fitting(words, width, font)
        if fits < len(words):
            if last:
                found.append(words[: _fitting(words, width - round(font.getlength("...")), font)].rstrip() + "...")
                break
            space = words.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        found.append(words[:fits].rstrip())
        words = words[fits:].lstrip()
    return found


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> int:
    """The number of first characters that fit into `width` pixels; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
