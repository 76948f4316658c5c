"""What decoding a JPEG 2000 takes in memory, from its headers.

OpenJPEG holds a tile whole, as 32 bit integers, and keeps accounts of every tile and of every code block. A file of
a few kilobytes may name 65,535 tiles, or blocks of 4 x 4 pixels in an image of any size.
"""

from __future__ import annotations

import itertools
import struct
from typing import NamedTuple

from univitar_ds.data.media.containers import boxes
from univitar_ds.errors import SampleError

_BYTES_A_TILE = 8700
_BYTES_A_TILE_AND_COMPONENT = 1100
_BYTES_A_BLOCK = 450
"""Measured with OpenJPEG 2.5.4: 9.7 kB a tile of one component, 12.9 of four; 392 to 450 B a component's block."""
_BYTES_A_CUT_BLOCK = 1000
"""Chosen, for blocks that precincts cut smaller: each precinct adds two trees and an account of its own."""

_COD, _COC, _SOT, _SOD, _EOC = 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
# All else that has a length: size, quantization, progression, pointers to packets, comments, extensions.
_OTHERS = {0xFF50, 0xFF51, *range(0xFF55, 0xFF59), *range(0xFF5C, 0xFF62), 0xFF63, 0xFF64, *range(0xFF74, 0xFF79)}
_MOST_BOXES = 1 << 12
_MOST_SEGMENTS = 1 << 18


class _Size(NamedTuple):
    pixels: int
    tile_pixels: int
    tiles: int
    components: int
    sample_bytes: int


def bytes_needed(data: bytes, bytes_a_pixel: int) -> float:
    """The most memory that decoding takes beside the file, in bytes; `bytes_a_pixel` are those of the loaded image.

    Raises: SampleError if there is no codestream where one has to be.
    """
    at = _codestream(data) + 2
    try:
        size = _read_size(data, at)
    except (struct.error, IndexError, ZeroDivisionError) as error:
        raise SampleError("corrupt", "the JPEG 2000 has no size of its tiles") from error
    blocks = _block_bytes_a_pixel(data, at, size.components)
    return (
        size.pixels * bytes_a_pixel
        + size.tiles * (_BYTES_A_TILE + size.components * _BYTES_A_TILE_AND_COMPONENT)
        + size.tile_pixels * size.components * (4 + size.sample_bytes + blocks)
    )


def _codestream(data: bytes) -> int:
    """Where the codestream begins: at once or, in the boxes of a JP2, in the first box of its kind."""
    at = 0
    if not data.startswith(b"\xff\x4f"):
        inside = itertools.islice(boxes(data, 0, len(data)), _MOST_BOXES)
        at = next((start for kind, start, _ in inside if kind == b"jp2c"), len(data))
    if not data.startswith(b"\xff\x4f\xff\x51", at):
        raise SampleError("corrupt", "the JPEG 2000 has no codestream")
    return at


def _read_size(data: bytes, at: int) -> _Size:
    """The segment that begins at `at`."""
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = struct.unpack_from(
        ">8IH", data, at + 6
    )
    width, height = max(right - left, 0), max(bottom - top, 0)
    across, down = -(-(right - tile_left) // tile_width), -(-(bottom - tile_top) // tile_height)
    bits = max(((data[at + 40 + 3 * index] & 127) + 1 for index in range(components)), default=8)
    return _Size(
        width * height,
        min(tile_width, width) * min(tile_height, height),
        max(across, 0) * max(down, 0),
        components,
        1 if bits <= 8 else 2 if bits <= 16 else 4,
    )


def _block_bytes_a_pixel(data: bytes, at: int, components: int) -> float:
    """The accounts of code blocks, for each pixel of a component, by the hungriest header of the stream and its tiles.

    A stream that goes on in an unknown way counts as one of the smallest blocks.
    """
    most, end = 0.0, 0
    for _ in range(_MOST_SEGMENTS):
        try:
            marker, length = struct.unpack_from(">HH", data, at)
            if marker == _EOC:
                return most
            if marker == _SOD and end > at:  # on to the next part of a tile
                at = end
                continue
            if marker == _SOT:
                (part,) = struct.unpack_from(">I", data, at + 6)
                end = at + part if part else len(data)
            elif marker == _COD:
                most = max(most, _of_style(data, at + 9, bool(data[at + 4] & 1)))
            elif marker == _COC:
                style = at + (5 if components < 257 else 6)
                most = max(most, _of_style(data, style + 1, bool(data[style] & 1)))
            elif marker not in _OTHERS:
                break
        except (struct.error, IndexError):
            return most  # the file ends here
        at += 2 + length
    return _BYTES_A_CUT_BLOCK


def _of_style(data: bytes, at: int, has_precincts: bool) -> float:
    """The same by a coding style: levels, log2 of a block's sides less 2, two bytes, log2 of each level's precincts."""
    sides = (data[at + 1] & 15) + 2, (data[at + 2] & 15) + 2
    least = sum(sides)
    for level in range(data[at] + 1 if has_precincts else 0):
        precinct = data[at + 5 + level]
        # Three bands of half its sides share a precinct, but for the first level's.
        cut = [max(side - (level > 0), 0) for side in (precinct & 15, precinct >> 4)]
        least = min(least, min(sides[0], cut[0]) + min(sides[1], cut[1]))
    return (_BYTES_A_BLOCK if least == sum(sides) else _BYTES_A_CUT_BLOCK) / (1 << least)
