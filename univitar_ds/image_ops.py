"""Any image as upright 8-bit RGB of a given size. Pillow and numpy only: decoding processes start with this."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image


class Orientation(NamedTuple):
    """What brings an image upright: first its sides change places, then its rows or columns are reversed.

    `transpose` is the same for Pillow; `inverse` the number of the orientation that undoes this one.
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
"""By the number that EXIF has for them. The display matrix of a video is one of them too."""
_NUMBERS = {one[:3]: number for number, one in ORIENTATIONS.items()}
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")

BLOCK = 512
"""An image is converted in squares of this side, so that the temporary memory of a conversion stays in the cache."""


def to_rgb(image: Image.Image) -> Image.Image:
    """`rgb_pixels` as an image, which is the given one if there is nothing to do.

    Raises: see `rgb_pixels`.
    """
    _load(image)  # some formats rotate the image while loading and then drop the tag
    if image.mode == "RGB" and "transparency" not in image.info and _orientation(image) == 1:
        return image
    return Image.fromarray(rgb_pixels(image))


def _load(image: Image.Image) -> None:
    """Decode an image. Pillow may reject a text after the pixels of a PNG when it has decoded all pixels."""
    try:
        image.load()
    except ValueError as error:
        if "MAX_TEXT_" not in str(error) or getattr(image, "tile", True):
            raise


def rgb_pixels(image: Image.Image, orientation: int | None = None) -> np.ndarray:
    """The upright RGB pixels of an image in any Pillow mode: (H, W, 3) uint8.

    EXIF orientation is applied, transparency is laid on white (release), and greys deeper than 8 bit are
    scaled to 8 bit rather than clipped. Needs a few MB in addition to the loaded image and the result.

    Args: orientation, 1 to 8, where it is known already.

    Raises: what Pillow raises for pixels that it cannot decode (OSError, SyntaxError, ValueError ...).
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
        if (turn := ORIENTATIONS[orientation].transpose) is not None:
            block = block.transpose(turn)
        place = upright(as_stored[top:bottom, left:right], orientation)
        place[...] = _opaque(block) if span is None else span.to_8_bit(_greys(block))
    return pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, ...) with its orientation, a key of `ORIENTATIONS`, undone."""
    swaps, rows, columns, *_ = ORIENTATIONS[orientation]
    if swaps:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def display_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """(height, width) of an image of this orientation as a viewer shows it."""
    return (width, height) if ORIENTATIONS[orientation].swaps_sides else (height, width)


def orientation_of_matrix(matrix: tuple[int, int, int, int]) -> int:
    """The key of `ORIENTATIONS` next to (a, b, c, d) of a display matrix: x' = a*x + c*y and y' = b*x + d*y."""
    a, b, c, d = matrix
    swaps = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if swaps else (a, d)
    return _NUMBERS[swaps, down < 0, across < 0]


def resize_rgb(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB image at exactly height x width pixels, bicubic (release): (height, width, 3) uint8."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, if the image has no tag."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1  # the pixels may be sound although the metadata is broken
    return int(orientation) if orientation in ORIENTATIONS else 1


def _blocks(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the squares that cover an image as it is stored."""
    for top in range(0, image.height, BLOCK):
        for left in range(0, image.width, BLOCK):
            yield left, top, min(left + BLOCK, image.width), min(top + BLOCK, image.height)


def _opaque(image: Image.Image) -> np.ndarray:
    """Any mode of at most 8 bit, transparency on white: (H, W, 3) uint8."""
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):  # premultiplied modes convert to their plain form only
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _greys(image: Image.Image) -> np.ndarray:
    """The values of a grey of more than 8 bit, 0 for NaN: (H, W, 1)."""
    values = np.asarray(image)[..., None]
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) if values.dtype.kind == "f" else values


class _GreySpan(NamedTuple):
    """Statistics of a whole image that are needed to scale a part of it; `whole`: it has no fractions."""

    low: float
    high: float
    whole: bool

    @classmethod
    def of(cls, image: Image.Image) -> _GreySpan:
        spans = []
        for block in _blocks(image):
            values = _greys(image.crop(block))
            spans.append((values.min(), values.max(), values.dtype.kind != "f" or (values == np.rint(values)).all()))
        lows, highs, wholes = zip(*spans, strict=True)
        return cls(float(min(lows)), float(max(highs)), all(wholes))

    def to_8_bit(self, values: np.ndarray) -> np.ndarray:
        """Greys of more than 8 bit as 8 bit: scaled by the range of their format if they have one, else by their own
        range."""
        values = values.astype(np.float64)
        if self.low < 0 or self.high > 65535:
            values = (values - self.low) * (255 / max(self.high - self.low, 1e-12))
        elif self.high > 255:
            values = values / 257
        elif not self.whole and self.high <= 1:
            values = values * 255
        return np.rint(values).astype(np.uint8)
