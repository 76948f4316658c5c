"""Detects the container format of a video file, its display matrix, and missing bytes at its end.

FFmpeg's own format detection is not used: it also accepts playlists and scripts, which open other files and addresses.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence

Matrix = tuple[int, int, int, int]
"""(a, b, c, d) of a display matrix: x' = a*x + c*y and y' = b*x + d*y, in units of 1/65536."""

_IMAGE_BRANDS = frozenset({b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"})
_MP4_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx"})
_PREFIXES = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV\x01", "flv"),
    (b"OggS", "ogg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (b"\x00\x00\x01\xba", "mpeg"),
    (b"\x00\x00\x01\xb3", "mpegvideo"),
    (b"GIF8", "gif"),
)
_TS_PACKET = 188
_SEGMENT, _TRACKS, _TRACK, _VIDEO, _PROJECTION, _ROLL = (
    0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x7670, 0x7675,
)  # fmt: skip
"""IDs of elements of Matroska and WebM."""
_MOST_ELEMENTS = _MOST_BOXES = 1 << 16

VIDEO_EXTENSION_OF = {
    "mov": "mp4",
    "matroska": "mkv",
    "avi": "avi",
    "flv": "flv",
    "ogg": "ogv",
    "asf": "asf",
    "mpeg": "mpg",
    "mpegvideo": "mpg",
    "mpegts": "ts",
    "gif": "gifv",
}
"""A file extension for each demuxer that `video_demuxer` returns."""


def video_demuxer(data: bytes) -> str | None:
    """Returns FFmpeg's name of the demuxer for a video file; None if the bytes are not a supported video container.

    Returns "gif" for every GIF: its bytes do not show whether it is meant as an image or as a video.
    """
    if data[4:8] in _MP4_BOXES:
        return None if data[4:8] == b"ftyp" and data[8:12] in _IMAGE_BRANDS else "mov"
    if data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    for prefix, demuxer in _PREFIXES:
        if data.startswith(prefix):
            return demuxer
    synced = all(data[at] == 0x47 for at in range(0, min(len(data), 3 * _TS_PACKET), _TS_PACKET))
    return "mpegts" if synced and len(data) >= _TS_PACKET else None


def mp4_matrices(data: bytes) -> dict[int, Matrix]:
    """Returns the display matrix of each track id of an MP4 or MOV file; empty if the boxes are invalid."""
    matrices = {}
    for moov in _boxes_named(b"moov", data, 0, len(data)):
        for trak in _boxes_named(b"trak", data, *moov):
            for start, end in _boxes_named(b"tkhd", data, *trak):
                wide = data[start] == 1 if end > start else False  # version 1: 64-bit times
                track_at, matrix_at = (20, 52) if wide else (12, 40)
                if start + matrix_at + 36 > end:
                    continue
                (track,) = struct.unpack_from(">I", data, start + track_at)
                a, b, _, c, d = struct.unpack_from(">5i", data, start + matrix_at)
                matrices[track] = (a, b, c, d)
    return matrices


def matroska_matrix(data: bytes) -> Matrix:
    """Returns the display matrix of the first video track of a Matroska or WebM file, from its roll."""
    for track in _elements_at(data, [_SEGMENT, _TRACKS, _TRACK]):
        if not list(_elements_named(data, *track, _VIDEO)):
            continue
        for start, end in _elements_at(data, [_VIDEO, _PROJECTION, _ROLL], track):
            if end - start in (4, 8):
                (degrees,) = struct.unpack_from(">f" if end - start == 4 else ">d", data, start)
                if math.isfinite(degrees) and round(degrees / 90) % 2:
                    return (0, 1, -1, 0)
        break
    return (1, 0, 0, 1)


def missing_bytes(data: bytes, demuxer: str) -> int:
    """Returns the number of bytes by which top-level boxes of an MP4, MOV, Matroska or WebM file exceed its end."""
    ends: Iterator[int] = iter(())
    if demuxer == "mov":
        outermost = itertools.islice(boxes(data, 0, len(data)), _MOST_BOXES)
        ends = (end for name, _, end in outermost if name in (b"moov", b"mdat", b"moof"))
    elif demuxer == "matroska":
        ends = (end for name, _, end in _all_elements(data, 0, len(data)) if name == _SEGMENT)
    return max(0, max(ends, default=0) - len(data))


def _boxes_named(name: bytes, data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of the contents of the boxes with this name, clipped to `end`."""
    return ((min(inner, end), min(stop, end)) for found, inner, stop in boxes(data, start, end) if found == name)


def _elements_at(data: bytes, path: Sequence[int], within: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of the contents of the elements at a path of IDs."""
    first, *rest = path
    for found in _elements_named(data, *(within or (0, len(data))), first):
        if rest:
            yield from _elements_at(data, rest, found)
        else:
            yield found


def _elements_named(data: bytes, start: int, end: int, name: int) -> Iterator[tuple[int, int]]:
    return ((inner, min(stop, end)) for found, inner, stop in _all_elements(data, start, end) if found == name)


def _all_elements(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields ID and (start, end) of the contents of the elements between two offsets. `end` follows from the stored
    size and may be beyond the data; an element of unknown size extends to the end."""
    for _ in range(_MOST_ELEMENTS):
        if start >= end:
            return
        name, at = _vint(data, start, keep_length=True)
        size, inner = _vint(data, at)
        if not name or not inner:
            return
        unknown = size == (1 << 7 * (inner - at)) - 1
        stop = end if unknown else inner + size
        yield name, inner, stop
        start = stop


def _vint(data: bytes, at: int, keep_length: bool = False) -> tuple[int, int]:
    """Returns a variable-length integer of EBML and the offset after it; (0, 0) if there is none.

    The position of its first set bit gives its length.
    """
    first = data[at] if at < len(data) else 0
    length = 9 - first.bit_length()
    if length > 8 or at + length > len(data):
        return 0, 0
    value = int.from_bytes(data[at : at + length], "big")
    return value if keep_length else value & ((1 << 7 * length) - 1), at + length


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields name and (start, end) of the contents of MP4, MOV or JP2 boxes between two offsets, without nested boxes.

    `end` follows from the stored size and may be beyond the data."""
    while start + 8 <= end:
        size, header = int.from_bytes(data[start : start + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        if size == 0:
            size = end - start
        if size < header:
            return
        yield data[start + 4 : start + 8], start + header, start + size
        start += size
