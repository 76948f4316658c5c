"""Any image as upright 8-bit RGB of a given size. Pillow and numpy only: decoding processes start with this."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

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
"""The transposition that makes each EXIF orientation upright."""
WITH_ALPHA = ("LA", "PA", "RGBA", "La", "RGBa")

_INVERSE = {6: 8, 8: 6}
"""The inverse of an orientation; all but these two are their own inverse."""
BLOCK = 512
"""An image is converted in squares of this side: so the temporary memory of a conversion stays in the cache."""


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
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    as_stored = upright(pixels, _INVERSE.get(orientation, orientation))
    span = _GreySpan.of(image) if image.mode in ("I", "F") or image.mode.startswith("I;") else None
    for left, top, right, bottom in _blocks(image):
        block = image.crop((left, top, right, bottom))
        if orientation > 1:  # Pillow transposes faster than numpy copies between different strides
            block = block.transpose(TURNS[orientation])
        place = upright(as_stored[top:bottom, left:right], orientation)
        place[...] = _opaque(block) if span is None else span.to_8_bit(_greys(block))
    return pixels


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, C) with its EXIF orientation, 1 to 8, undone."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def resize_rgb(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An RGB image at exactly height x width pixels, bicubic (release): (height, width, 3) uint8."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, if the image has no tag."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return 1  # the pixels may be sound although the metadata is broken
    return int(orientation) if orientation in range(1, 9) else 1


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
