"""Pictures and clips to the encoder's input: colour, orientation, size, patches."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kernels.reference import normalise, patchify
from univitar_ds.config.encoder import EncoderConfig, read_encoder_config
from univitar_ds.errors import UserError
from univitar_ds.geometry import PATCH, TUBELET

ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an EXIF orientation upright."""
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB picture out of any Pillow mode.

    EXIF orientation is applied, transparency is laid on white (release), and greys deeper than 8 bit are
    scaled to 8 bit rather than cut off.

    Raises: whatever Pillow raises for pixels it cannot decode (OSError, SyntaxError, ValueError ...).
    """
    image.load()  # some formats turn themselves upright while loading, and drop their tag then
    turn = TURNS.get(_orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_deep_grey(np.asarray(image))).convert("RGB")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # premultiplied modes convert to their plain form only
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def resize_rgb(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB picture at exactly height x width pixels, bicubic (release): (height, width, 3) uint8."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


class Preprocessor:
    """Turns pictures and clips into the encoder's `pixel_values` and `grid_thw`, as its release did."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads the rule from an encoder's `config.json`. Raises: CheckpointError if there is no valid one."""
        return cls(read_encoder_config(folder))

    def __call__(self, items: Sequence[Image.Image | Sequence[Image.Image]]) -> tuple[Tensor, Tensor]:
        """Prepares a pack.

        Args: items: pictures, and clips as lists of frames (one, or an even number, all of one size).
        Returns: `pixel_values` (T, 1176) float32 and `grid_thw` (N, 3) int64.
        Raises: UserError for anything else.
        """
        if isinstance(items, Image.Image) or not items:
            raise UserError("the preprocessor takes a list of at least one picture or clip; put a single one in a list")
        clips = [self._upright(item, index) for index, item in enumerate(items)]
        grids = [self._grid(frames) for frames in clips]
        pixels = [
            resize_rgb(frame, h * PATCH, w * PATCH).reshape(-1)
            for frames, (_, h, w) in zip(clips, grids, strict=True)
            for frame in frames
        ]
        patches = patchify(
            torch.from_numpy(np.concatenate(pixels)), [len(c) for c in clips], grids, self.config.spatial_merge_size
        )
        values = normalise(patches, self.config.image_mean, self.config.image_std)
        return values, torch.tensor(grids, dtype=torch.int64)

    def _upright(self, item: Image.Image | Sequence[Image.Image], index: int) -> list[Image.Image]:
        frames = [item] if isinstance(item, Image.Image) else list(item)
        strange = [type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)]
        if strange:
            raise UserError(f"item {index} holds a {strange[0]}; pictures and frames must be PIL images")
        if not frames:
            raise UserError(f"item {index} is a clip without frames; give one frame or a multiple of {TUBELET}")
        if len(frames) > 1 and len(frames) % TUBELET:
            raise UserError(f"item {index} has {len(frames)} frames; give one frame or a multiple of {TUBELET}")
        frames = [to_rgb(frame) for frame in frames]
        sizes = sorted({frame.size for frame in frames})
        if len(sizes) > 1:
            raise UserError(f"item {index} has frames of different sizes {sizes}; bring all frames to one size")
        return frames

    def _grid(self, frames: list[Image.Image]) -> tuple[int, int, int]:
        width, height = (max(1, int(side * self.config.relarge_ratio)) for side in frames[0].size)
        try:
            return self.config.resolution.grid(height, width, len(frames))
        except ValueError as error:
            raise UserError(
                f"a clip of {len(frames)} frames does not fit max_tokens {self.config.max_tokens} ({error}); "
                f"give fewer frames"
            ) from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1  # broken metadata says nothing about the pixels


def _deep_grey(values: np.ndarray) -> np.ndarray:
    """Greys of more than 8 bit as 8 bit: by their format's range where they keep to one, else by their own."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.rint(values)).all())
    if low < 0 or high > 65535:
        values = (values - low) * (255 / max(high - low, 1e-12))
    elif high > 255:
        values = values / 257
    elif not whole and high <= 1:
        values = values * 255
    return np.rint(values).astype(np.uint8)
