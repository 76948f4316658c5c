"""Limits the memory of decoding: `confine` sets a limit of the operating system for a process that reads media, and
`check_memory` rejects valid images that need more.

`confine` stops hostile files, independently of their headers. A valid image loaded by Pillow and its RGB copy take 7
bytes per pixel. Most decoders need little more, at most 10.1 in total (all numbers here are measured with Pillow 13.0
on images of 2.5 to 100 Mpx). The formats in `_bytes_needed` need more. The size of the file is added.
"""

from __future__ import annotations

import math
import mmap
import resource
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image

from univitar_ds.errors import SampleError
from univitar_ds.image_ops import ORIENTATION_TAG

LEAST_LIMIT = 2**30
BYTES_A_PIXEL = LEAST_LIMIT / 10**8
"""Decoding may take 1 GiB, and more if `data.max_image_px` is raised above its default."""

_MARGIN = 1.02
_BITS, _SAMPLES, _STRIP_ROWS, _TILE_WIDTH, _TILE_LENGTH = 258, 277, 278, 322, 323
"""TIFF tags."""
_AVIF = {"L": 10.0, "RGB": 21.0, "RGBA": 24.0}
"""9.5 measured for RGB of 8 bit and 4:2:0, 11.7 for RGBA. The rest is for 10 bit, 4:4:4 and
film grain, which Pillow does not report."""
_WEBP = 16.4
"""Two canvases of 4 bytes per pixel, the frame as bytes and the loaded image."""
_CMYK_JPEG = 12.0
"""Progressive files need this, others 7; both are treated alike."""
_DEEP_PPM = 13.2
"""Decoded in Python with two copies; 7 if the maximum value is 65535."""
_CODESTREAM = b"\xff\x4f\xff\x51"
_JPEG2000_SAMPLE, _JPEG2000_TABLES = 4, 0.2
"""Bytes per sample of a tile, which OpenJPEG keeps in memory: 32-bit integers and code block tables, in
addition to the samples."""


def check_memory(image: Image.Image, data: bytes, max_px: int) -> None:
    """Rejects a valid image if, by its header, decoding may exceed the limit that `confine` sets.

    If only `confine` rejected it, the result would depend on the process: memory for earlier images leaves as little as
    half of the limit (measured). Also, the decoders of JPEG 2000 and of progressive CMYK JPEG report a failed
    allocation as damage.

    Args: image: opened, but not decoded; data: the bytes of its file; max_px: `data.max_image_px`.
    Raises: SampleError if decoding may take more memory than `max_px` allows.
    """
    needed = _MARGIN * _bytes_needed(image, data)
    limit = _limit(max_px)
    if needed > limit:
        raise SampleError(
            "too_large",
            f"{image.width} x {image.height} pixels of {image.format} {image.mode} may take {needed / 2**20:.0f} MiB "
            f"while they are decoded, above the {limit / 2**20:.0f} that data.max_image_px = {max_px} allows; "
            f"raise it to {math.ceil(needed / BYTES_A_PIXEL)} or store the image as PNG",
        )


def confine(max_px: int, file_bytes: int) -> None:
    """Limits the memory that this decoding process may allocate, in addition to its memory at the first call.

    An allocation above the limit fails, and the file counts as a bad sample. Has an effect on Linux only.

    Args: max_px: `data.max_image_px`; file_bytes: size of the file, which decoders may copy.
    """
    with suppress(OSError, ValueError):
        most = int(_data_bytes_at_first() + _limit(max_px) + 2 * file_bytes)
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@cache
def _data_bytes_at_first() -> int:
    """Returns the size in bytes of the private writable memory of this process at the first call."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[5]) * mmap.PAGESIZE


def _limit(max_px: int) -> float:
    return max(LEAST_LIMIT, max_px * BYTES_A_PIXEL)


def _bytes_needed(image: Image.Image, data: bytes) -> float:
    """Returns the bytes that decoding may take; 0 for images that need less than `BYTES_A_PIXEL`."""
    pixels = image.width * image.height
    match image.format:
        case "WEBP":
            return pixels * _WEBP + len(data)  # its decoder copies the file
        case "AVIF":
            return pixels * _AVIF.get(image.mode, max(_AVIF.values())) + len(data)
        case "JPEG" | "MPO" if image.mode == "CMYK":
            return pixels * _CMYK_JPEG
        case "PPM" if image.mode == "I":
            return pixels * _DEEP_PPM
        case "JPEG2000":
            return _jpeg2000_bytes(image, data)
        case "TIFF":
            return _tiff_bytes(image)
    return 0.0


def _tiff_bytes(image: Image.Image) -> float:
    """Returns the bytes of the image, of a copy if it is rotated, and of a strip or tile, which may be larger."""
    if not image.tile or image.tile[0].codec_name != "libtiff":
        return 0.0
    tags = image.tag_v2
    width, height = image.width, image.height
    rotated = _number(tags.get(ORIENTATION_TAG), 1) > 1
    if _TILE_WIDTH in tags:
        unit = _number(tags.get(_TILE_WIDTH), width) * _number(tags.get(_TILE_LENGTH), height)
    else:
        rows = _number(tags.get(_STRIP_ROWS), height)
        unit = max(width * min(rows, height), height * min(rows, width))  # sides may be swapped
    bits = _number(tags.get(_BITS), 1) * _number(tags.get(_SAMPLES), 1)
    return width * height * _stored(image.mode) * (1 + rotated) + unit * bits / 8


def _jpeg2000_bytes(image: Image.Image, data: bytes) -> float:
    """Returns the bytes of the image and its largest tile; 0 if the header is incomplete, which the decoder reports."""
    try:
        at = data.index(_CODESTREAM) + 8
        right, bottom, left, top, tile_width, tile_height, _, _, components = struct.unpack_from(">8IH", data, at)
        bits = max(((data[at + 34 + 3 * number] & 127) + 1 for number in range(components)), default=8)
    except (ValueError, IndexError, struct.error):
        return 0.0
    tile = min(tile_width, max(right - left, 0)) * min(tile_height, max(bottom - top, 0)) * components
    sample = 1 if bits <= 8 else 2 if bits <= 16 else 4
    return image.width * image.height * _stored(image.mode) + tile * (_JPEG2000_SAMPLE + sample + _JPEG2000_TABLES)


def _number(value: object, default: int) -> int:
    """Returns the largest value of a tag."""
    values = value if isinstance(value, tuple) else (value,)
    return max((int(each) for each in values if isinstance(each, int)), default=default)


def _stored(mode: str) -> int:
    """Returns the bytes per pixel of a loaded image."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4
