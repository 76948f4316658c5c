"""Draws the synthetic scenes: anti-aliased shapes on smooth backgrounds, as uint8 arrays and as files.

Positions and sizes are integers in quarters of a pixel. A shape is drawn at four times its size and averaged, so the
frames of a video in reverse order are bitwise equal to those of the opposite motion.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw

QUARTER = 4
"""Sub-pixels per pixel, the unit of positions and sizes of shapes."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (36, 150, 62),
    "blue": (38, 76, 214),
    "yellow": (242, 216, 40),
    "purple": (126, 44, 166),
    "pink": (246, 132, 190),
    "cyan": (44, 196, 214),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
X264 = {"crf": "10", "preset": "veryfast", "x264-params": "asm=0:mbtree=0"}
"""Options of x264. asm=0, because its vector code reads past the edge of small images and the bytes then vary."""


@dataclass(frozen=True)
class Thing:
    """A shape of a scene. `left_q`, `top_q` and `diameter_q` are in quarters of a pixel."""

    colour: str
    shape: str
    rgb: tuple[int, int, int]
    diameter_q: int
    left_q: int
    top_q: int

    @property
    def name(self) -> str:
        """The shape in words, such as "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Background:
    """A gradient between two colours, with noise. `angle`: radians; `noise`: standard deviation in grey levels."""

    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float
    noise: float
    noise_key: int


def luminance(rgb: tuple[int, int, int]) -> float:
    """Returns the luminance of an 8-bit colour, 0 to 255 (Rec. 601)."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def draw_background(background: Background, height: int, width: int) -> np.ndarray:
    """Draws a background: (height, width, 3) float32, 0 to 255."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    across = (columns / max(width - 1, 1) - 0.5) * math.cos(background.angle)
    down = (rows / max(height - 1, 1) - 0.5) * math.sin(background.angle)
    blend = np.clip(across + down + 0.5, 0, 1)[..., None].astype(np.float32)
    first, second = np.float32(background.first), np.float32(background.second)
    canvas = first + (second - first) * blend
    if background.noise:
        grain = np.random.Generator(np.random.Philox(key=background.noise_key))
        canvas = canvas + grain.normal(0, background.noise, (height, width, 1)).astype(np.float32)
    return canvas


def draw_thing(canvas: np.ndarray, thing: Thing) -> np.ndarray:
    """Draws a shape on a copy of `canvas` (height, width, 3). The shape wraps around the edges."""
    height, width = canvas.shape[:2]
    column, phase_x = divmod(thing.left_q, QUARTER)
    row, phase_y = divmod(thing.top_q, QUARTER)
    alpha = _coverage(thing.shape, thing.diameter_q, phase_x, phase_y)
    fits = alpha.shape[0] <= height and alpha.shape[1] <= width
    assert fits, "a shape must be smaller than its scene"
    where = np.ix_((row + np.arange(alpha.shape[0])) % height, (column + np.arange(alpha.shape[1])) % width)
    result = canvas.copy()
    below = canvas[where]
    result[where] = below + (np.float32(thing.rgb) - below) * alpha[..., None]
    return result


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """Rounds `canvas` to uint8."""
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _coverage(shape: str, diameter: int, phase_x: int, phase_y: int) -> np.ndarray:
    """Returns the share of each pixel that the shape covers, (rows, columns) float32, 0 to 1."""
    columns, rows = -(-(diameter + phase_x) // QUARTER), -(-(diameter + phase_y) // QUARTER)
    mask = Image.new("L", (columns * QUARTER, rows * QUARTER), 0)
    pen = ImageDraw.Draw(mask)
    _trace(pen, shape, phase_x, phase_y, diameter)
    return np.asarray(mask.reduce(QUARTER), dtype=np.float32) / 255


def _trace(pen: ImageDraw.ImageDraw, shape: str, left: int, top: int, size: int) -> None:
    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        return left + x0 * (size - 1), top + y0 * (size - 1), left + x1 * (size - 1), top + y1 * (size - 1)

    if shape == "circle":
        pen.ellipse(box(0, 0, 1, 1), fill=255)
    elif shape == "square":
        pen.rectangle(box(0.06, 0.06, 0.94, 0.94), fill=255)
    elif shape == "ring":
        pen.ellipse(box(0, 0, 1, 1), fill=255)
        pen.ellipse(box(0.25, 0.25, 0.75, 0.75), fill=0)
    elif shape == "cross":
        pen.rectangle(box(0.34, 0, 0.66, 1), fill=255)
        pen.rectangle(box(0, 0.34, 1, 0.66), fill=255)
    elif shape == "crescent":
        pen.ellipse(box(0, 0, 1, 1), fill=255)
        pen.ellipse(box(0.32, 0.02, 1.14, 0.84), fill=0)
    else:
        outline = _outline(shape)
        pen.polygon([(left + x * (size - 1), top + y * (size - 1)) for x, y in outline], fill=255)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Returns the corners of a polygon in the unit square, with y downwards."""
    if shape == "triangle":
        return [(0.5, 0.04), (1.0, 0.92), (0.0, 0.92)]
    if shape == "star":
        angles = [math.pi * k / 5 for k in range(10)]
        return [(0.5 + r * math.sin(a), 0.54 - r * math.cos(a)) for a, r in zip(angles, (0.53, 0.22) * 5, strict=True)]
    assert shape == "heart", shape
    angles = [2 * math.pi * k / 48 for k in range(48)]
    return [
        (
            0.5 + math.sin(a) ** 3 / 2,
            0.45 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 32,
        )
        for a in angles
    ]


def encode_image(pixels: np.ndarray, *, extension: str, quality: int) -> bytes:
    """Encodes a (height, width, 3) uint8 image as JPEG (`jpg`) or PNG (`png`)."""
    out = io.BytesIO()
    if extension == "png":
        Image.fromarray(pixels).save(out, format="PNG", compress_level=3)
    else:
        Image.fromarray(pixels).save(out, format="JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def encode_mp4(frames: list[np.ndarray], rate: int) -> bytes:
    """Encodes frames (height, width, 3) uint8 with even sides as MP4: H.264, or MPEG-4 if PyAV lacks x264."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=Fraction(rate), options=X264)
        else:
            stream = container.add_stream("mpeg4", rate=Fraction(rate), options={"qmin": "2", "qmax": "3"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # more threads split the image differently and give other bytes
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return out.getvalue()
