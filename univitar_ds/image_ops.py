"""Converts images to upright 8-bit RGB and resizes them. Imports only Pillow and numpy, for decoding processes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image


class Orientation(NamedTuple):
    """The operations that make an image upright: swap the sides, then reverse rows or columns.

    `transpose` is the same operation in Pillow, `inverse` the key in `ORIENTATIONS` of the inverse operation.
    """

    swaps_sides: bool
    reverses_rows: bool
    reverses_columns: bool
    transpose: Image.Transpose | None
    inverse: int


ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    1: Orientation(False, False, False, None, 1),
    2: Orientation(False, False, True, Image.Transpose.FLIP_LEFT_RIGHT, 2),
    3: Orientation(False, True, True, Image.Transpose.ROTATE_180, 3),
    4: Orientation(False, True, False, Image.Transpose.FLIP_TOP_BOTTOM, 4),
    5: Orientation(True, False, False, Image.Transpose.TRANSPOSE, 5),
    6: Orientation(True, False, True, Image.Transpose.ROTATE_270, 8),
    7: Orientation(True, True, True, Image.Transpose.TRANSVERSE, 7),
    8: Orientation(True, True, False, Image.Transpose.ROTATE_90, 6),
}
"""Orientations by EXIF number. The display matrix of a video corresponds to one of them."""
_NUMBERS = {one[:3]: number for number, one in ORIENTATIONS.items()}
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")

BLOCK = 512
"""Side in pixels of the squares in which an image is converted, so that temporary memory stays in the cache."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the upright RGB image; `image` itself if it needs no conversion.

    Raises: as `rgb_pixels`.
    """
    _load(image)  # some formats rotate the image while loading and then remove the tag
    if image.mode == "RGB" and "transparency" not in image.info and _orientation(image) == 1:
        return image
    return Image.fromarray(rgb_pixels(image))


def _load(image: Image.Image) -> None:
    """Decodes an image. Ignores Pillow's error for a text after the pixels of a PNG, when all pixels are decoded."""
    try:
        image.load()
    except ValueError as error:
        if "MAX_TEXT_" not in str(error) or getattr(image, "tile", True):
            raise


def rgb_pixels(image: Image.Image, orientation: int | None = None) -> np.ndarray:
    """Returns the upright RGB pixels of an image in any Pillow mode: (H, W, 3) uint8.

    Applies the EXIF orientation, blends transparency with white (as the public release of UniViTAR does), and scales
    grey values of more than 8 bits to 8 bits. Needs a few MB in addition to the loaded image and the result.

    Args: orientation: a key of `ORIENTATIONS`; None: that of the image's tag.
    Raises: Pillow's errors for pixels that it cannot decode (OSError, SyntaxError, ValueError ...).
    """
    image.load()
    orientation = orientation or _orientation(image)
    height, width = image.height, image.width
    pixels = np.empty((*display_size(height, width, orientation), 3), np.uint8)
    as_stored = upright(pixels, ORIENTATIONS[orientation].inverse)
    span = _GreySpan.of(image) if image.mode in ("I", "F") or image.mode.startswith("I;") else None
    for left, top, right, bottom in _blocks(image):
        block = image.crop((left, top, right, bottom))
        # Pillow transposes faster than numpy copies between different strides.
        if (method := ORIENTATIONS[orientation].transpose) is not None:
            block = block.transpose(method)
        target = upright(as_stored[top:bottom, left:right], orientation)
        target[...] = _opaque(block) if span is None else span.to_8_bit(_greys(block))
    return pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Returns an upright view of `pixels` (H, W, ...). `orientation`: a key of `ORIENTATIONS`."""
    swaps, rows, columns, *_ = ORIENTATIONS[orientation]
    if swaps:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def display_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """Returns (height, width) of an upright image that is stored with this size and orientation."""
    return (width, height) if ORIENTATIONS[orientation].swaps_sides else (height, width)


def orientation_of_matrix(matrix: tuple[int, int, int, int]) -> int:
    """Returns the key of `ORIENTATIONS` nearest to a display matrix (a, b, c, d): x' = a*x + c*y, y' = b*x + d*y."""
    a, b, c, d = matrix
    swaps = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if swaps else (a, d)
    return _NUMBERS[swaps, down < 0, across < 0]


def resize_rgb(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Returns an RGB image resized to (height, width, 3) uint8, bicubic as in the public release."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _orientation(image: Image.Image) -> int:
    """Returns the image's key of `ORIENTATIONS`; 1 (upright) if it has no valid tag."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1  # the pixels may be intact although the metadata is broken
    return int(orientation) if orientation in ORIENTATIONS else 1


def _blocks(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yields left, top, right and bottom of the squares that cover an image as it is stored."""
    for top in range(0, image.height, BLOCK):
        for left in range(0, image.width, BLOCK):
            yield left, top, min(left + BLOCK, image.width), min(top + BLOCK, image.height)


def _opaque(image: Image.Image) -> np.ndarray:
    """Converts any mode of at most 8 bits to RGB, with transparency blended with white. Returns (H, W, 3) uint8."""
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # Pillow converts premultiplied modes only to their plain form
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _greys(image: Image.Image) -> np.ndarray:
    """Returns the values of a grey image of more than 8 bits: (H, W, 1), with 0 for NaN and infinity."""
    values = np.asarray(image)[..., None]
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if values.dtype.kind == "f" else values


class _GreySpan(NamedTuple):
    """Range of the values of a grey image. `integral`: whether all values are integers."""

    low: float
    high: float
    integral: bool

    @classmethod
    def of(cls, image: Image.Image) -> _GreySpan:
        """Returns the range of a whole image, computed block by block."""
        spans = []
        for block in _blocks(image):
            values = _greys(image.crop(block))
            spans.append((values.min(), values.max(), values.dtype.kind != "f" or (values == np.rint(values)).all()))
        lows, highs, integral = zip(*spans, strict=True)
        return cls(float(min(lows)), float(max(highs)), all(integral))

    def to_8_bit(self, values: np.ndarray) -> np.ndarray:
        """Scales grey values to 8 bits.

        The range of the whole image decides its format: 0 to 1 (floats), 0 to 255 or 0 to 65535. Images with other
        values are scaled by their own range.
        """
        values = values.astype(np.float64)
        if self.low < 0 or self.high > 65535:
            values = (values - self.low) * (255 / max(self.high - self.low, 1e-12))
        elif self.high > 255:
            values = values / 257
        elif not self.integral and self.high <= 1:
            values = values * 255
        return np.rint(values).astype(np.uint8)
