"""Decodes images to pixels. Raises SampleError for every fault of the data; never returns a partly decoded image."""

from __future__ import annotations

import io
import re

import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, IcoImagePlugin, Image, PngImagePlugin

from univitar_ds.data.media import jpeg_header
from univitar_ds.data.media.memory_limits import check_memory
from univitar_ds.data.media.probe import open_image, orientation_of
from univitar_ds.data.media.resize import Extent
from univitar_ds.data.media.types import check_area, check_size, reason
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import display_size, rgb_pixels, upright

# Errors of libjpeg-turbo for damaged image data, for which Pillow would return grey or garbage pixels.
_DAMAGED_SCAN = re.compile("bad Huffman code|bad arithmetic|premature end of data|resync|RST", re.IGNORECASE)

_SCAN = b"\xff\xda"
MOST_SCANS = 500
"""Maximum number of scans of a progressive JPEG. Each scan processes all pixels; ordinary images have 10 scans, and
2,000 fit into a megabyte."""
_MIN_SCALE = 2
"""A JPEG decoded at a smaller scale has at least this many times the target's height and width. After resizing, it
differs from a full decode by 1 level of 255 on average; if decoded to the target size, by 2 to 4, most in printed text
and fine texture."""


def decode_image(data: bytes, *, max_px: int) -> np.ndarray:
    """Decodes an image, or the first frame of an animated image.

    EXIF orientation is applied, and transparent pixels are composited on white.

    Args: max_px: maximum number of pixels.
    Returns: (H, W, 3) uint8.
    Raises: SampleError.
    """
    return decode_near(data, max_px=max_px, target=None)[0]


def decode_near(
    data: bytes, *, max_px: int, target: tuple[int, int] | None, size: tuple[int, int] | None = None
) -> tuple[np.ndarray, Extent]:
    """Decodes an image that will be resized to `target`. A much larger JPEG is decoded at a smaller scale.

    Args: max_px: maximum number of pixels; target: (height, width), None: decode at full size; size: the (height,
        width) that the image must have, None for any.
    Returns: (H, W, 3) uint8, and the extent of the image in these pixels: at a smaller scale, it may end within the
        last row or column.
    Raises: SampleError.
    """
    orientation = None
    if jpeg_header.is_jpeg(data):
        header = jpeg_header.read_header(data)
        check_area(header.height, header.width, max_px)
        check_size(size, header.display_size)
        if header.progressive and data.count(_SCAN) > MOST_SCANS:
            raise SampleError("too_large", f"the JPEG has more than {MOST_SCANS} scans; store it with fewer")
        orientation = header.orientation
        if header.channels in (1, 3) and header.precision == 8:
            found = _turbo(data, header, target)
            if found is not None:
                return found
    pixels = _pillow(data, max_px, orientation)
    check_size(size, pixels.shape[:2])
    return pixels, pixels.shape[:2]


def _turbo(
    data: bytes, header: jpeg_header.JpegHeader, target: tuple[int, int] | None
) -> tuple[np.ndarray, Extent] | None:
    """Decodes with libjpeg-turbo. Returns None for errors after which Pillow is tried."""
    scale = {}
    if target is not None and _may_shrink(header):
        height, width = display_size(*target, header.orientation)
        height, width = _MIN_SCALE * height, _MIN_SCALE * width
        if 2 * height <= header.height and 2 * width <= header.width:
            scale = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scale)
    except ValueError as error:
        if _DAMAGED_SCAN.search(str(error)):
            raise SampleError("corrupt", f"the JPEG is damaged: {error}") from error
        return None
    eighths = round(8 * pixels.shape[0] / header.height)
    if header.orientation == 1:
        return pixels, (header.height * eighths / 8, header.width * eighths / 8)
    rotated = np.ascontiguousarray(upright(pixels, header.orientation))
    return rotated, rotated.shape[:2]


def _may_shrink(header: jpeg_header.JpegHeader) -> bool:
    """Whether the image may be decoded at a smaller scale.

    At that scale, a side that is not a multiple of 8 ends within a pixel, and rotation may move this pixel to the first
    row or column.
    """
    return header.orientation == 1 or (header.height % 8 == 0 and header.width % 8 == 0)


def _pillow(data: bytes, max_px: int, orientation: int | None) -> np.ndarray:
    with open_image(data) as image:
        check_area(image.height, image.width, max_px)
        if isinstance(image, IcoImagePlugin.IcoImageFile):
            check_area(*_icon_size(data, image), max_px)
        check_memory(image, data, max_px)
        try:
            return rgb_pixels(image, orientation or orientation_of(image))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise many types for damaged data
            raise SampleError("corrupt", f"the {image.format} image cannot be decoded: {reason(error)}") from error


def _icon_size(data: bytes, icon: IcoImagePlugin.IcoImageFile) -> tuple[int, int]:
    """Returns (height, width) of the image in an icon that Pillow decodes, not of the icon's directory."""
    stream = io.BytesIO(data)
    inner: Image.Image
    try:
        at = stream.seek(icon.ico.entry[0].offset)
        if data.startswith(b"\x89PNG\r\n\x1a\n", at):
            inner = PngImagePlugin.PngImageFile(stream)
            return inner.height, inner.width
        inner = BmpImagePlugin.DibImageFile(stream)
        return inner.height // 2, inner.width  # the height includes the mask
    except MemoryError:
        raise
    except Exception as error:
        raise SampleError("corrupt", f"the ICO image cannot be decoded: {reason(error)}") from error
