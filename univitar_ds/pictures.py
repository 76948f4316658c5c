"""Any picture as upright 8-bit RGB of a given size. Pillow and numpy only: decoding processes start with this."""

from __future__ import annotations

import struct

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
