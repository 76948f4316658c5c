"""Computes the parts of pages of items: patch features as colours, frames to show, resized images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FITTED_TOKENS = 4096
"""Maximum number of tokens from which principal components are computed."""
DIRECTIONS, ROUNDS = 8, 16
"""Number of directions and of iterations of the subspace iteration."""


def component_colours(features: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Maps features of items, each (T_i, D), to the first three principal components as colours, (T_i, 3) uint8.

    0 and 255 are the 2nd and the 98th percentile. Also returns each component's share of the variance, from 0 to 1.
    """
    centred = torch.cat(list(features)).float()
    centred -= centred.mean(dim=0)
    basis = _principal(centred[:: -(-len(centred) // FITTED_TOKENS)], 3)
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()  # the sign is arbitrary
    values = centred @ basis
    shares = values.square().sum(dim=0) / centred.square().sum().clamp(min=1e-12)
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    colours = (scaled * 255).round().to(torch.uint8).split([len(part) for part in features])
    return list(colours), shares.clamp(0, 1).tolist()


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


def to_size(pixels: Tensor | np.ndarray, height: int, max_width: int) -> Image.Image:
    """Resizes (h, w, 3) uint8 to `height`, or less if the width would exceed `max_width`. Keeps the aspect ratio.

    Small images are enlarged by repeating pixels, so that the encoder's input is not smoothed.
    """
    image = Image.fromarray(np.asarray(pixels))
    scale = min(height / image.height, max_width / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # With the gap, a large image is reduced in a third of the time; values of one of 1022 x 770 px changed by up to 7.
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC, reducing_gap=3.0)
