"""Converts images and videos to the encoder's input, as the public release of UniViTAR does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig, read_encoder_config
from univitar_ds.errors import UserError
from univitar_ds.geometry import PATCH, TUBELET
from univitar_ds.image_ops import resize_rgb, to_rgb
from univitar_ds.kernels.reference import normalise, patchify


class Preprocessor:
    """Preprocessor that converts images and videos to the encoder's `pixel_values` and `grid_thw`."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads an encoder's `config.json`. Raises: CheckpointError if the file is missing or invalid."""
        return cls(read_encoder_config(folder))

    def __call__(self, items: Sequence[Image.Image | Sequence[Image.Image]]) -> tuple[Tensor, Tensor]:
        """Prepares a pack.

        Args: items: images, and videos as lists of frames (one, or an even number, of equal size).
        Returns: `pixel_values` (T, 1176) float32 and `grid_thw` (N, 3) int64.
        Raises: UserError if `items` is empty, contains other objects, or a video has too many frames.
        """
        pixels, frames, grids = self.pixels(items)
        patches = patchify(pixels, frames, grids, self.config.spatial_merge_size)
        values = normalise(patches, self.config.image_mean, self.config.image_std)
        return values, torch.tensor(grids, dtype=torch.int64)

    def pixels(
        self, items: Sequence[Image.Image | Sequence[Image.Image]]
    ) -> tuple[Tensor, list[int], list[tuple[int, int, int]]]:
        """Prepares a pack as bytes for `model(pixels, grids, frames=frames)`.

        Bytes need an eighth of the memory of `pixel_values`, for videos a quarter.

        Returns: pixels (B,) uint8, see `kernels.reference.patchify`; number of frames and grid of each item.
        Raises: UserError as `__call__`.
        """
        if isinstance(items, Image.Image) or not items:
            raise UserError("the preprocessor takes a list of at least one image or video; put a single one in a list")
        videos = [self._upright(item, index) for index, item in enumerate(items)]
        grids = [self.grid(frames) for frames in videos]
        pixels = [
            resize_rgb(frame, h * PATCH, w * PATCH).reshape(-1)
            for frames, (_, h, w) in zip(videos, grids, strict=True)
            for frame in frames
        ]
        return torch.from_numpy(np.concatenate(pixels)), [len(frames) for frames in videos], grids

    def _upright(self, item: Image.Image | Sequence[Image.Image], index: int) -> list[Image.Image]:
        frames = [item] if isinstance(item, Image.Image) else list(item)
        strange = [type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)]
        if strange:
            raise UserError(f"item {index} has an object of type {strange[0]}; images and frames must be PIL images")
        if not frames:
            raise UserError(f"item {index} is a video without frames; give one frame or a multiple of {TUBELET}")
        if len(frames) > 1 and len(frames) % TUBELET:
            raise UserError(f"item {index} has {len(frames)} frames; give one frame or a multiple of {TUBELET}")
        frames = [to_rgb(frame) for frame in frames]
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) > 1:
            raise UserError(f"item {index} has frames of different sizes {sizes}; bring all frames to one size")
        return frames

    def grid(self, frames: Sequence[Image.Image]) -> tuple[int, int, int]:
        """Returns the tokens along time, height and width of an image, as a list of one frame, or a video.

        Raises: UserError if a video has too many frames.
        """
        width, height = (max(1, int(side * self.config.relarge_ratio)) for side in frames[0].size)
        try:
            return self.config.resolution.grid(height, width, len(frames))
        except ValueError as error:
            raise UserError(
                f"a video of {len(frames)} frames does not fit max_tokens {self.config.max_tokens} ({error}); "
                f"give fewer frames"
            ) from error
