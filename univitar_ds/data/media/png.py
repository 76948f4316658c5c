"""Texts and colour profiles of a PNG that are larger than Pillow takes, hidden from it: the pixels are what counts.

Pillow refuses the whole image for one of them. Nothing here is unpacked beyond Pillow's own limits, so that a text
which unpacks to gigabytes costs no more than one that is just allowed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ICON = b"\0\0\1\0"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_HIDDEN = b"xXXt"
"""A chunk that no program knows and none needs to know: ancillary, public, safe to copy."""
_chunk_start = struct.Struct(">I4s").unpack_from
_AROUND = 12
"""Bytes of a chunk beside its content: length, name, checksum."""


def without_large_texts(data: bytes) -> bytes:
    """A PNG, or an icon of PNGs, whose texts and profiles above Pillow's limits have a name that Pillow skips; `data`
    itself where there are none.

    Nothing moves. A chunk with a wrong checksum is damaged and stays as it is.
    """
    if not data.startswith((SIGNATURE, ICON)):
        return data
    changed: bytearray | None = None
    room = PngImagePlugin.MAX_TEXT_MEMORY
    for begin, end, name in _chunks(data):
        if name not in _TEXTS:
            continue
        size = _unpacked(name, data[begin + 8 : end - 4]) if room > 0 else None
        room -= PngImagePlugin.MAX_TEXT_CHUNK if size is None else size
        if size is not None and room >= 0:
            continue
        if zlib.crc32(data[begin + 4 : end - 4]) == int.from_bytes(data[end - 4 : end]):
            changed = bytearray(data) if changed is None else changed
            changed[begin + 4 : begin + 8] = _HIDDEN
            changed[end - 4 : end] = zlib.crc32(changed[begin + 4 : end - 4]).to_bytes(4)
    return data if changed is None else bytes(changed)


def _chunks(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """First byte, byte after the last, and name of the chunks of every PNG in the file."""
    start = data.find(SIGNATURE)
    while start >= 0:
        start += len(SIGNATURE)
        while start + _AROUND <= len(data):
            length, name = _chunk_start(data, start)
            end = start + _AROUND + length
            if end > len(data):
                break
            yield start, end, name
            start = end
            if name == b"IEND":
                break
        start = data.find(SIGNATURE, start)


def _unpacked(name: bytes, content: bytes) -> int | None:
    """Bytes of the text or profile; None where that is more than Pillow unpacks."""
    rest = content.partition(b"\0")[2]
    if name == b"tEXt":
        return len(rest)
    packed = rest[1:]  # after the method
    if name == b"iTXt":
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
        if rest[:1] == b"\0":
            return len(packed)
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:  # Pillow takes it for empty
        return 0
    return None if unpacking.unconsumed_tail else len(text)
