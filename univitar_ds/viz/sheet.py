"""Computes the parts of image sheets: patch features as colours, resized images, wrapped captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

FITTED_TOKENS = 4096
"""Maximum number of tokens from which principal components are computed."""
DIRECTIONS, ROUNDS = 8, 16
"""Number of directions and of iterations of the subspace iteration."""


def component_colours(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps features of items, each (T_i, D), to the first three principal components as colours, (T_i, 3) uint8."""
    centred = torch.cat(list(features)).float()
    centred -= centred.mean(dim=0)
    basis = _principal(centred[:: -(-len(centred) // FITTED_TOKENS)], 3)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()  # the sign is arbitrary
    values = centred @ basis
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return list((scaled * 255).round().to(torch.uint8).split([len(part) for part in features]))


def _principal(centred: Tensor, count: int) -> Tensor:
    """Computes the first `count` principal directions of rows (n, D) by subspace iteration. Returns (D, count).

    The result is exact enough for colours. Training waits for it, and at D 1920 an eigendecomposition took 12 times as
    long.
    """
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(centred.shape[1], min(DIRECTIONS, centred.shape[1]), generator=generator)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    projected = centred @ basis
    _, vectors = torch.linalg.eigh(projected.T @ projected)
    return basis @ vectors[:, -count:].flip(1)


def spread_frames(count: int, shown: int) -> list[int]:
    """Returns at most `shown` (2 or more) of the indices below `count`, evenly spaced from first to last."""
    return sorted({round((count - 1) * part / (shown - 1)) for part in range(shown)})


def to_size(pixels: Tensor | np.ndarray, height: int, max_width: int, *, smooth: bool) -> Image.Image:
    """Resizes (h, w, 3) uint8 to `height`, or less if the width would exceed `max_width`. Keeps the aspect ratio."""
    image = Image.fromarray(np.asarray(pixels))
    scale = min(height / image.height, max_width / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def wrapped(text: str, width: int, lines: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Wraps `text` to at most `lines` lines of `width` pixels. Text that does not fit ends with three dots."""
    words, wrapped_lines = " ".join(text.split()), []
    while words and len(wrapped_lines) < lines:
        last = len(wrapped_lines) == lines - 1
        fits = _fitting(words, width, font)
        if fits < len(words):
            if last:
                wrapped_lines.append(
                    words[: _fitting(words, width - round(font.getlength("...")), font)].rstrip() + "..."
                )
                break
            space = words.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        wrapped_lines.append(words[:fits].rstrip())
        words = words[fits:].lstrip()
    return wrapped_lines


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont) -> int:
    """Returns the length of the longest prefix that fits into `width` pixels; at least 1."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
