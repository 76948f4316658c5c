"""Decoded pixels to the size the encoder takes: whole patches, nothing padded, nothing cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from univitar_ds.geometry import PATCH
from univitar_ds.pictures import resize_rgb


def fit_image(pixels: np.ndarray, grid_thw: Sequence[int]) -> np.ndarray:
    """A picture resized to its grid, bicubic and antialiased as in the release.

    Args: pixels (H, W, 3) uint8; grid (t, h, w) in tokens.
    Returns: (h * 14, w * 14, 3) uint8.
    """
    _, h, w = grid_thw
    height, width = h * PATCH, w * PATCH
    if pixels.shape[:2] == (height, width):
        return pixels
    return resize_rgb(Image.fromarray(pixels), height, width)


def fit_clip(pixels: np.ndarray, grid_thw: Sequence[int]) -> np.ndarray:
    """A clip (F, H, W, 3) uint8 resized frame by frame to (F, h * 14, w * 14, 3); see `fit_image`."""
    return np.stack([fit_image(frame, grid_thw) for frame in pixels])
