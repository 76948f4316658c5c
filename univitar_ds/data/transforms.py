"""Decoded pixels to the size the encoder takes: whole patches, nothing padded, nothing cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from univitar_ds.data.resample import Extent, resize
from univitar_ds.geometry import PATCH


def fit_image(
    pixels: np.ndarray, grid_thw: Sequence[int], out: np.ndarray | None = None, extent: Extent | None = None
) -> np.ndarray:
    """A picture resized to its grid, bicubic and antialiased; `resample.resize` says how near the release's it is.

    Args: pixels (H, W, 3) uint8; grid (t, h, w) in tokens; out, where to put the result instead of new memory;
        extent, see `resize`.
    Returns: (h * 14, w * 14, 3) uint8; `pixels` itself where it fits already and there is no `out`.
    """
    _, h, w = grid_thw
    shape = (h * PATCH, w * PATCH, 3)
    if out is None:
        if pixels.shape == shape:
            return pixels
        out = np.empty(shape, np.uint8)
    assert out.shape == shape, (out.shape, shape)
    if pixels.shape == shape:
        out[:] = pixels
    else:
        resize(np.ascontiguousarray(pixels), out, extent)
    return out
