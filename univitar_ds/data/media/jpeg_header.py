"""Reads the size, channels and EXIF orientation of a JPEG from the markers before its first scan.

The loader reads the header of every JPEG before decoding it, and before planning if the metadata has no size. Reading
the markers takes a microsecond; opening the image with a library takes a hundred times as long. The frame header may be
at an offset of hundreds of kilobytes, after colour profiles and thumbnails.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from univitar_ds.errors import SampleError
from univitar_ds.image_ops import ORIENTATION_TAG, ORIENTATIONS, display_size

_SOI = b"\xff\xd8"
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_APP1, _SCAN, _END = 0xE1, 0xDA, 0xD9
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


# A segment begins with a marker of two bytes and a length of two bytes. `_PASSED`: markers without size or orientation,
# i.e. APP0, APP2 to APP15, comments, quantization tables, Huffman tables and restart intervals.
_segment = struct.Struct(">HH").unpack_from
_PASSED = frozenset({0xFFE0, *range(0xFFE2, 0xFFF0), 0xFFFE, 0xFFDB, 0xFFC4, 0xFFDD})
_frame_start = struct.Struct(">BHHB").unpack_from
"""Precision, height, width and channels."""
_USUAL_FRAMES = frozenset({0xFFC0, 0xFFC2})
"""Baseline and progressive."""


class JpegHeader(NamedTuple):
    """A frame header. `height` and `width` are in pixels before the EXIF `orientation` (1 to 8) is applied."""

    height: int
    width: int
    channels: int
    precision: int
    orientation: int
    progressive: bool = False

    @property
    def display_size(self) -> tuple[int, int]:
        """(height, width) after the orientation is applied."""
        return display_size(self.height, self.width, self.orientation)


def is_jpeg(data: bytes) -> bool:
    return data[:2] == _SOI and data[2:3] == b"\xff"


def read_header(data: bytes) -> JpegHeader:
    """Reads the frame header and the orientation. Skips stray bytes between markers, as decoders do.

    Raises: SampleError if there is no frame header, or if its height or width is 0.
    """
    position = 2
    try:
        marker, length = _segment(data, position)
        while marker in _PASSED:
            position += 2 + length
            marker, length = _segment(data, position)
        if marker in _USUAL_FRAMES:
            precision, height, width, channels = _frame_start(data, position + 4)
            if height and width and length > 7:
                return JpegHeader(height, width, channels, precision, 1, marker == 0xFFC2)
    except struct.error:
        pass
    return _read_slowly(data)


def _read_slowly(data: bytes) -> JpegHeader:
    """Reads a header with EXIF or XMP, with padding or stray bytes between markers, or with damage."""
    from_exif = from_xmp = 0
    position = 2
    while True:
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            raise SampleError("corrupt", f"the JPEG ends after {len(data)} bytes, before its frame header")
        marker = data[position + 1]
        if marker in (0x00, 0xFF) or marker in _WITHOUT_LENGTH:
            position += 1 if marker == 0xFF else 2
            continue
        if marker in (_SCAN, _END):
            raise SampleError("corrupt", f"the JPEG has no frame header before byte {position}")
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker in _FRAME_HEADERS:
            return _frame(body, from_exif or from_xmp or 1, marker in _PROGRESSIVE)
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            from_exif = from_exif or _exif_orientation(body[6:])
        elif marker == _APP1 and (found := _XMP_ORIENTATION.search(body)):
            from_xmp = int(found[1])
        position += 2 + max(length, 2)


def _frame(body: bytes, orientation: int, progressive: bool) -> JpegHeader:
    if len(body) < 6:
        raise SampleError("corrupt", "the JPEG ends inside its frame header")
    precision, height, width, channels = struct.unpack(">BHHB", body[:6])
    if not height or not width:
        raise SampleError("corrupt", f"the JPEG's frame header has {width} x {height} pixels")
    return JpegHeader(height, width, channels, precision, orientation, progressive)


def _exif_orientation(tiff: bytes) -> int:
    """Returns the orientation, 1 to 8, in a TIFF block's first directory; 0 if there is no valid one."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 0
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start + 2 > len(tiff):
        return 0
    (entries,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == ORIENTATION_TAG:
            return value if kind == 3 and count == 1 and value in ORIENTATIONS else 0
    return 0
