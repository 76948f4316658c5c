"""How an image enters the encoder: whole at its native size, or as overlapping windows of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import PATCH
from univitar_ds.image_ops import resize_rgb
from univitar_ds.model.encoder import UniViTAR


class Box(NamedTuple):
    """A window in patches: its first row and column, and its rows and columns."""

    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Views:
    """The rule by which images are cut. `window`, `stride`: sides of square windows in patches; None: whole images.

    Without windows an image is resized to the encoder's native size: about its own, within the encoder's limits of
    tokens. With windows it keeps its size, rounded to whole cells (squares of merged patches), or is enlarged until its
    shorter side is as long as a window.
    """

    encoder: EncoderConfig
    window: int | None = None
    stride: int | None = None

    @classmethod
    def of(cls, encoder: EncoderConfig, window_px: int | None, stride_px: int | None) -> Views:
        """Returns the rule for windows of these sides in pixels.

        Args: window_px: None: whole images; stride_px: None: two thirds of the window, rounded down to whole cells.
        Raises: ConfigError if a side is not a multiple of a cell, the stride is above the window or has none, or a
            window has more tokens than the encoder allows.
        """
        if window_px is None:
            if stride_px is not None:
                raise ConfigError(f"--stride {stride_px} is for windows; give --window too")
            return cls(encoder)
        cell = PATCH * encoder.spatial_merge_size
        if stride_px is None:
            stride_px = max(2 * window_px // 3 // cell, 1) * cell
        for name, value in (("--window", window_px), ("--stride", stride_px)):
            if value % cell or value < cell:
                near = max(round(value / cell), 1) * cell
                raise ConfigError(f"{name} {value}: the encoder takes multiples of {cell} pixels; give {near}")
        if stride_px > window_px:
            raise ConfigError(f"--stride {stride_px} is above --window {window_px} and would leave gaps; lower it")
        most = encoder.max_tokens
        if (window_px // PATCH) ** 2 > most:
            raise ConfigError(
                f"--window {window_px} has {(window_px // PATCH) ** 2} tokens, above the encoder's {most}; lower it"
            )
        return cls(encoder, window_px // PATCH, stride_px // PATCH)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image of height x width pixels."""
        if self.window is None:
            _, rows, columns = self.encoder.resolution.grid(height, width)
            return rows, columns
        merge = self.encoder.spatial_merge_size
        grow = max(1.0, self.window * PATCH / min(height, width))
        rows, columns = (max(round(side * grow / PATCH / merge) * merge, self.window) for side in (height, width))
        return rows, columns

    def boxes(self, rows: int, columns: int) -> list[Box]:
        """Returns the windows that cover an image of these patches; the last ones end at its border."""
        if self.window is None or self.stride is None:
            return [Box(0, 0, rows, columns)]
        side, step = self.window, self.stride
        tops, lefts = ([*range(0, length - side, step), length - side] for length in (rows, columns))
        return [Box(top, left, side, side) for top in tops for left in lefts]

    def cut(self, pixels: np.ndarray) -> tuple[tuple[int, int], list[tuple[Box, np.ndarray]]]:
        """Returns the grid of an image, and its windows with their pixels (rows*14, columns*14, 3) uint8."""
        grid = self.grid(*pixels.shape[:2])
        whole = resize_rgb(Image.fromarray(pixels), grid[0] * PATCH, grid[1] * PATCH)
        return grid, [(box, crop(whole, box)) for box in self.boxes(*grid)]


def crop(whole: np.ndarray, box: Box) -> np.ndarray:
    """Returns the pixels of a window. Args: whole: (H, W, ...) pixels of an image of whole patches."""
    return whole[box.top * PATCH : (box.top + box.rows) * PATCH, box.left * PATCH : (box.left + box.columns) * PATCH]


def patch_labels(labels: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns the labels of an image at rows x columns patches by the nearest pixel, (rows*14, columns*14)."""
    height, width = labels.shape
    down = ((np.arange(rows * PATCH) + 0.5) * height / (rows * PATCH)).astype(np.int64)
    across = ((np.arange(columns * PATCH) + 0.5) * width / (columns * PATCH)).astype(np.int64)
    return labels[down[:, None], across]


def of_patches(labels: np.ndarray) -> np.ndarray:
    """Returns the labels of the pixels of each patch, (rows * columns, 196). Args: labels: (rows*14, columns*14)."""
    rows, columns = (side // PATCH for side in labels.shape)
    return labels.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2).reshape(rows * columns, PATCH * PATCH)


@torch.no_grad()
def encode(encoder: UniViTAR, images: Sequence[np.ndarray], budget: int) -> Iterator[Tensor]:
    """Yields the features of the patches of each image, (rows * columns, D) row by row, on the encoder's device.

    Args: images: (rows*14, columns*14, 3) uint8; budget: maximum number of tokens of a pack.
    """
    device = next(encoder.parameters()).device
    pack: list[np.ndarray] = []
    for place, image in enumerate(images):
        pack.append(image)
        following = images[place + 1].size if place + 1 < len(images) else 0
        if following and (sum(one.size for one in pack) + following) // (3 * PATCH * PATCH) <= budget:
            continue
        pixels = torch.from_numpy(np.concatenate([one.reshape(-1) for one in pack])).to(device)
        grids = [(1, one.shape[0] // PATCH, one.shape[1] // PATCH) for one in pack]
        (maps,) = encoder.forward_intermediates(
            pixels, grids, [-1], frames=[1] * len(pack), intermediates_only=True, output_fmt="NCHW"
        )
        yield from (one[0].flatten(1).T for one in maps)
        pack = []
