"""Which kind of file some bytes are, told by their content; and how a video file wants to be turned.

The name of the demuxer is decided here and never by FFmpeg's own guessing: that would also take playlists
and scripts, which open other files and addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

Matrix = tuple[int, int, int, int]
"""(a, b, c, d) of a display matrix: x' = a*x + c*y and y' = b*x + d*y, in units of 1/65536."""

_PICTURE_BRANDS = frozenset({b"avif", b"avis", b"mif1", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"})
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
"""An extension that fits, for each answer of `video_demuxer`."""


def video_demuxer(data: bytes) -> str | None:
    """FFmpeg's name of the demuxer for a video file, None if the bytes are no video container we read.

    "gif" is an answer too: whether a GIF is meant as a picture or as a clip, its bytes do not tell.
    """
    if data[4:8] in _MP4_BOXES:
        return None if data[4:8] == b"ftyp" and data[8:12] in _PICTURE_BRANDS else "mov"
    if data[:4] == b"RIFF" and data[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    for prefix, demuxer in _PREFIXES:
        if data.startswith(prefix):
            return demuxer
    synced = all(data[at] == 0x47 for at in range(0, min(len(data), 3 * _TS_PACKET), _TS_PACKET))
    return "mpegts" if synced and len(data) >= _TS_PACKET else None


def mp4_matrices(data: bytes) -> dict[int, Matrix]:
    """Display matrix of each track id of an MP4 or MOV file; empty where the boxes make no sense."""
    matrices = {}
    for moov in _boxes(data, 0, len(data), b"moov"):
        for trak in _boxes(data, *moov, b"trak"):
            for start, end in _boxes(data, *trak, b"tkhd"):
                wide = data[start] == 1 if end > start else False  # version 1: 64-bit times
                track_at, matrix_at = (20, 52) if wide else (12, 40)
                if start + matrix_at + 36 > end:
                    continue
                (track,) = struct.unpack_from(">I", data, start + track_at)
                a, b, _, c, d = struct.unpack_from(">5i", data, start + matrix_at)
                matrices[track] = (a, b, c, d)
    return matrices


def swaps_sides(matrix: Matrix) -> bool:
    """True for a turn by a quarter: height and width change places."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _boxes(data: bytes, start: int, end: int, name: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the contents of the boxes called `name` between two offsets, not looking inside others."""
    return ((inner, stop) for found, inner, stop in boxes_between(data, start, end) if found == name)


def boxes_between(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name and (start, end) of the contents of the boxes between two offsets, not looking inside."""
    while start + 8 <= end:
        size, header = int.from_bytes(data[start : start + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif size == 0:
            size = end - start
        if size < header:
            return
        yield data[start + 4 : start + 8], min(start + header, end), min(start + size, end)
        start += size
