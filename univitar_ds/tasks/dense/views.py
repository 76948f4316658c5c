"""How an image enters the encoder: whole at its native size, or as overlapping windows of one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from univitar_ds.errors import ConfigError
from univitar_ds.geometry import PATCH
from univitar_ds.image_ops import resize_rgb
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.tasks.sizes import PatchRule


class Box(NamedTuple):
    """A window in patches: its first row and column, and its rows and columns."""

    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Views:
    """The rule by which images are cut. `window`, `stride`: sides of square windows in patches; None: whole images.

    Without windows an image is resized to the model's native size: about its own, within the limits of tokens. With
    windows it keeps its size, rounded to whole cells (squares of merged patches), or is enlarged until its shorter side
    is as long as a window.
    """

    rule: PatchRule
    window: int | None = None
    stride: int | None = None

    @classmethod
    def of(cls, rule: PatchRule, window_px: int | None, stride_px: int | None) -> Views:
        """Returns the rule for windows of these sides in pixels.

        Args: window_px: None: whole images, or the squares of a model that reads no others; stride_px: None: two thirds
            of the window, rounded down to whole cells.
        Raises: ConfigError if a side is not a multiple of a cell, the stride is above the window or has none, or the
            model cannot read a window.
        """
        if rule.only_fixed:
            if window_px not in (None, rule.fixed_px):
                raise ConfigError(
                    f"--window {window_px}: the model reads squares of {rule.fixed_px} px only; leave it out"
                )
            window_px = rule.fixed_px
        if window_px is None:
            if stride_px is not None:
                raise ConfigError(f"--stride {stride_px} is for windows; give --window too")
            return cls(rule)
        cell = rule.patch * rule.merge
        if stride_px is None:
            stride_px = max(2 * window_px // 3 // cell, 1) * cell
        for name, value in (("--window", window_px), ("--stride", stride_px)):
            if value % cell or value < cell:
                near = max(round(value / cell), 1) * cell
                raise ConfigError(f"{name} {value}: the encoder takes multiples of {cell} pixels; give {near}")
        if stride_px > window_px:
            raise ConfigError(f"--stride {stride_px} is above --window {window_px} and would leave gaps; lower it")
        count = (window_px // rule.patch) ** 2
        if count > rule.most:
            raise ConfigError(f"--window {window_px} has {count} tokens, above the encoder's {rule.most}; lower it")
        return cls(rule, window_px // rule.patch, stride_px // rule.patch)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image of height x width pixels."""
        if self.window is None:
            return self.rule.grid(height, width)
        patch, merge = self.rule.patch, self.rule.merge
        grow = max(1.0, self.window * patch / min(height, width))
        rows, columns = (max(round(side * grow / patch / merge) * merge, self.window) for side in (height, width))
        return rows, columns

    def boxes(self, rows: int, columns: int) -> list[Box]:
        """Returns the windows that cover an image of these patches; the last ones end at its border."""
        if self.window is None or self.stride is None:
            return [Box(0, 0, rows, columns)]
        side, step = self.window, self.stride
        tops, lefts = ([*range(0, length - side, step), length - side] for length in (rows, columns))
        return [Box(top, left, side, side) for top in tops for left in lefts]

    def cut(self, pixels: np.ndarray) -> tuple[tuple[int, int], list[tuple[Box, np.ndarray]]]:
        """Returns the grid of an image, and its windows with their pixels (rows*patch, columns*patch, 3) uint8."""
        grid, patch = self.grid(*pixels.shape[:2]), self.rule.patch
        whole = resize_rgb(Image.fromarray(pixels), grid[0] * patch, grid[1] * patch)
        return grid, [(box, crop(whole, box, patch)) for box in self.boxes(*grid)]


def crop(whole: np.ndarray, box: Box, patch: int) -> np.ndarray:
    """Returns the pixels of a window. Args: whole: (H, W, ...) pixels of an image of whole patches."""
    down, across = (slice(begin * patch, (begin + count) * patch) for begin, count in (box[::2], box[1::2]))
    return whole[down, across]


def patch_labels(labels: np.ndarray, rows: int, columns: int, patch: int) -> np.ndarray:
    """Returns the labels of an image at rows x columns patches by the nearest pixel, (rows*patch, columns*patch)."""
    height, width = labels.shape
    down = ((np.arange(rows * patch) + 0.5) * height / (rows * patch)).astype(np.int64)
    across = ((np.arange(columns * patch) + 0.5) * width / (columns * patch)).astype(np.int64)
    return labels[down[:, None], across]


def of_patches(labels: np.ndarray, patch: int) -> np.ndarray:
    """Returns the labels of the pixels of each patch, (rows * columns, patch^2).

    Args: labels: (rows*patch, columns*patch)."""
    rows, columns = (side // patch for side in labels.shape)
    return labels.reshape(rows, patch, columns, patch).swapaxes(1, 2).reshape(rows * columns, patch * patch)


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
