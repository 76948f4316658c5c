"""Augments images and videos: draws a crop, a flip and colours for an item, and applies them to uint8 pixels.

Colours are bitwise equal to those of torchvision's `ColorJitter` and `RandomGrayscale` on Pillow images, which timm and
open_clip use. The exception is the hue, because Pillow's 8-bit HSV is off by up to 5 levels and takes two to three
times as long. All frames of a video are changed in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from univitar_ds.data.media.resize import Extent
from univitar_ds.randomness import draws

_JITTER = ("brightness", "contrast", "saturation", "hue")
_STEP, _LARGE = 8, 512
"""A crop of a side of at least `_LARGE` px begins at a multiple of `_STEP`. JPEGs are decoded at scales of n/8, so that
the crop begins with a whole pixel at each of them. Smaller images are rarely decoded at a smaller scale."""
_BLOCK = 1 << 13
"""Pixels that are converted to floats at a time, so that temporary memory stays in the cache."""
_ORDERS = tuple(itertools.permutations(range(len(_JITTER))))


class Crop(NamedTuple):
    """A part of an image, in pixels of the image at its original size, `of_height` x `of_width`."""

    top: int
    left: int
    height: int
    width: int
    of_height: int
    of_width: int

    def whole(self, height: int, width: int) -> tuple[int, int]:
        """Returns the smallest size of the whole image at which the crop has at least `height` x `width` pixels."""
        return -(-height * self.of_height // self.height), -(-width * self.of_width // self.width)

    def cut(self, pixels: np.ndarray, extent: Extent | None = None) -> tuple[np.ndarray, Extent]:
        """Cuts the crop out of an image, also if the image was decoded at a smaller scale.

        In that case the first row and column are those nearest to the crop's (see `_STEP`), and the crop may end within
        the last ones.

        Args: pixels (H, W, 3); extent: the size of the image within `pixels` (default: all of it).
        Returns: a view of `pixels`, and the extent of the crop within it.
        """
        height, width = extent or pixels.shape[:2]
        top, rows = _span(self.top, self.height, self.of_height, height)
        left, columns = _span(self.left, self.width, self.of_width, width)
        return pixels[top : top + math.ceil(rows), left : left + math.ceil(columns)], (rows, columns)


def square_crop(height: int, width: int, number: int, count: int) -> Crop:
    """Returns the largest square of an image at one of `count` positions, evenly spaced along the longer side: with 3,
    both ends and the centre; with 1, the centre. Args: number: of the position, from 0 on; height, width: in pixels."""
    side = min(height, width)
    top, left = (
        (length - side) * number // (count - 1) if count > 1 else (length - side) // 2 for length in (height, width)
    )
    step = _STEP if max(height, width) >= _LARGE else 1
    return Crop(top - top % step, left - left % step, side, side, height, width)


def _span(start: int, length: int, whole: int, extent: float) -> tuple[int, float]:
    """Returns start and length of a part of a side, for a side of `extent` pixels instead of `whole`."""
    scaled = length * extent / whole
    return min(round(start * extent / whole), int(extent - scaled)), scaled


class Augmentation(NamedTuple):
    """The changes of one item, in this order: crop, flip, operations on colours, grey. Empty fields change nothing.

    `jitter` has pairs of operation and factor. As JSON it is a list with the same elements.
    """

    crop: Crop | None = None
    flip: bool = False
    jitter: Sequence[tuple[str, float]] = ()
    grey: bool = False

    @classmethod
    def from_json(cls, document: Sequence[Any]) -> Augmentation:
        """Returns the augmentation in a decoded JSON list."""
        crop, flip, jitter, grey = document
        return cls(None if crop is None else Crop(*crop), flip, [(name, factor) for name, factor in jitter], grey)

    def finish(self, frames: np.ndarray) -> None:
        """Applies flip, jitter and grey in place. Args: frames: all frames of an item, (F, H, W, 3) uint8,
        C-contiguous."""
        if self.flip:
            pixels = frames.view("V3")[..., 0]  # moves each pixel as one element
            pixels[...] = pixels[:, :, ::-1].copy()
        if self.jitter or self.grey:
            recolour(frames, self.jitter, grey=self.grey)


@dataclass(frozen=True)
class Augment:
    """The augmentation of a stage; see `config.stage.AugmentConfig`, which has the same fields."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    jitter_probability: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0

    def drawn(self, draw: int, height: int, width: int) -> Augmentation:
        """Draws the augmentation of an item. It depends on the arguments only.

        Each setting has draws of its own, so that changing one of them does not change the others' results.

        Args: draw: the item's random number in this epoch; height, width: its original size in pixels.
        """
        scale, ratio, top, left, flip, jitter, grey, order, *factors = draws(8 + len(_JITTER), draw, "augment").tolist()
        shares = [_share(number) for number in factors]
        operations = []
        for index in _ORDERS[order % len(_ORDERS)] if _share(jitter) < self.jitter_probability else ():
            name = _JITTER[index]
            if reach := getattr(self, name):
                low, high = (-reach, reach) if name == "hue" else (max(0.0, 1 - reach), 1 + reach)
                operations.append((name, low + shares[index] * (high - low)))
        return Augmentation(
            self._crop((scale, ratio, top, left), height, width),
            _share(flip) < self.flip,
            tuple(operations),
            _share(grey) < self.grey,
        )

    def _crop(self, numbers: tuple[int, int, int, int], height: int, width: int) -> Crop | None:
        """Draws share of the area, ratio and position. The ratio is limited to what this share of the image allows."""
        if self.crop_scale[0] == 1:
            return None
        scale, ratio, top, left = numbers
        low, high = self.crop_scale
        area = low + _share(scale) * (high - low)
        narrowest, widest = (math.log(min(max(end, area), 1 / area)) for end in self.crop_ratio)
        stretch = math.exp(narrowest + _share(ratio) * (widest - narrowest))
        rows = min(max(round(height * math.sqrt(area / stretch)), 1), height)
        columns = min(max(round(width * math.sqrt(area * stretch)), 1), width)
        return Crop(_start(top, rows, height), _start(left, columns, width), rows, columns, height, width)


def _start(number: int, length: int, side: int) -> int:
    """Returns the first pixel of a part of a side for a uniform 64-bit number."""
    step = _STEP if side >= _LARGE else 1
    return number % ((side - length) // step + 1) * step


def _share(number: int) -> float:
    """Returns a float in [0, 1) for a uniform 64-bit number."""
    return (number >> 11) * 2.0**-53


def recolour(frames: np.ndarray, jitter: Sequence[tuple[str, float]], *, grey: bool = False) -> None:
    """Applies operations on colours in place, in their order, then grey.

    With v a value from 0 to 255, g the grey of its pixel (0.299 red + 0.587 green + 0.114 blue) and m the rounded mean
    of all g of the item: brightness f gives f*v, contrast f*v + (1-f)*m, saturation f*v + (1-f)*g, each clipped to
    0..255 and rounded down. Hue f adds f modulo 1 to the pixel's hue in HSV; the result is rounded to the nearest. As m
    is the mean of all frames, values that are equal in two frames of a video remain equal.

    Args: frames: (F, H, W, 3) uint8, C-contiguous.
    """
    from PIL import Image, ImageStat  # trainers draw augmentations and do not need Pillow

    image = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
    for name, factor in jitter:
        if name == "hue":
            pixels = np.array(image)
            _turn_hue(pixels.reshape(-1, 3), factor)
            image = Image.fromarray(pixels)
            continue
        if name == "saturation":
            image = Image.blend(image.convert("L").convert("RGB"), image, factor)
            continue
        at_0 = 0 if name == "brightness" else int(ImageStat.Stat(image.convert("L")).mean[0] + 0.5)
        # A table of the 256 levels gives what `blend` gives, in half the time.
        levels = Image.frombytes("L", (256, 1), bytes(range(256)))
        image = image.point(Image.blend(Image.new("L", (256, 1), at_0), levels, factor).tobytes() * 3)
    if grey:
        image = image.convert("L").convert("RGB")
    frames[...] = np.asarray(image).reshape(frames.shape)


def _turn_hue(pixels: np.ndarray, factor: float) -> None:
    """Turns hues in place; value and chroma of HSV stay. Args: pixels: (n, 3) uint8; factor: share of the circle.

    With value v, chroma c and hue h in sixths, a channel is v - c * max(0, min(k, 4 - k, 1)), with k = h plus 5, 3 or 1
    modulo 6. Here, `turn` is c * h, so that no division is needed. It may lie in one of two periods; absolute values
    treat both alike, which is faster than a remainder.
    """
    for start in range(0, len(pixels), _BLOCK):
        part = pixels[start : start + _BLOCK]
        planes = np.empty((3, len(part)), np.float32)
        for channel in range(3):  # faster than one transposing copy
            planes[channel] = part[:, channel]
        red, green, blue = planes
        value = np.maximum(np.maximum(red, green), blue)
        chroma = value - np.minimum(np.minimum(red, green), blue)
        turn = red - green + 4 * chroma
        np.copyto(turn, blue - red + 2 * chroma, where=value == green)
        np.copyto(turn, green - blue, where=value == red)
        twice, thrice = 2 * chroma, 3 * chroma
        for channel, shift in enumerate((5, 3, 1)):
            fall = turn + np.float32((shift + 6 * factor) % 6 - 5) * chroma
            np.abs(fall, out=fall)
            fall -= thrice
            np.abs(fall, out=fall)
            np.subtract(twice, fall, out=fall)
            np.maximum(fall, 0, out=fall)
            np.minimum(fall, chroma, out=fall)
            np.subtract(value, fall, out=fall)
            fall += np.float32(0.5)  # rounds to the nearest, since `astype` truncates
            part[:, channel] = fall.astype(np.uint8)
