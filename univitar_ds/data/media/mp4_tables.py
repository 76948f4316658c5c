"""Whether the tables of an MP4 or MOV file can be true: FFmpeg believes them before it has read a sample."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from univitar_ds.data.media.containers import boxes
from univitar_ds.errors import SampleError

_HOLDERS = frozenset(
    {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"udta", b"edts", b"dinf", b"tref"}
    | {b"gmhd", b"ilst", b"sinf", b"schi", b"wave"}
)
"""Boxes that hold nothing but boxes, wherever FFmpeg meets them."""
_ENTRY_BYTES = {b"stts": 8, b"ctts": 8, b"stsc": 12, b"stco": 4, b"co64": 8, b"stss": 4, b"stps": 4}
_TABLES = frozenset({*_ENTRY_BYTES, b"stsz", b"stz2", b"trun"})
_DEPTH = 12  # FFmpeg gives up at 11
_MOST_BOXES = 1_000_000
_MOST_HEADER = 1 << 20
_PCM_SAMPLES = 128
"""Sound may be counted in single amplitudes, many of which share a byte if it is compressed: 44 in the densest codec
of QuickTime. FFmpeg joins at least 160 of them in one entry of its index."""


def check_mp4_tables(data: bytes) -> None:
    """Raises: SampleError if the tables of an MP4 or MOV file claim more than the file can hold.

    FFmpeg builds its index from these claims while it opens a file, before it reads a sample: 72 bytes for each one
    claimed, with nothing to hold it to the length of the file.
    """
    _check_tables(data, len(data), depth=0)


@dataclass
class _Track:
    """What the boxes of one track claim."""

    handlers: set[bytes] = field(default_factory=set)
    timings: list[tuple[int, int]] = field(default_factory=list)  # entries of stts, ticks a sample of the first one
    timed: int = 0
    sized: list[tuple[int, int]] = field(default_factory=list)  # samples of one size, that size
    runs: list[np.ndarray] = field(default_factory=list)
    chunks: int = 0

    def samples(self, length: int) -> int:
        """Entries of FFmpeg's index that take no byte of a table. Raises: SampleError."""
        pcm = b"soun" in self.handlers and b"vide" not in self.handlers and self.timings == [(1, 1)]
        most = length * _PCM_SAMPLES if pcm else length
        _check("stts", self.timed, "samples", most, f"the {length} bytes of the file")
        for count, size in self.sized:
            if pcm:  # the size is often that of an amplitude before compression
                _check("stsz", count, "samples", most, f"the {length} bytes of the file")
            else:
                most_sized = length // size
                _check("stsz", count, f"samples of size {size}", most_sized, f"the {length} bytes of the file")
        if not pcm:
            return sum(count for count, _ in self.sized)
        amplitudes = 0
        for runs in self.runs:
            first, each = runs[:, 0].astype(np.float64), runs[:, 1].astype(np.float64)
            repeats = np.diff(first, append=self.chunks + 1.0)
            amplitudes += int((np.maximum(repeats, 0) * each).sum())
        _check("stsc", amplitudes, "samples", most, f"the {length} bytes of the file")
        return amplitudes // _PCM_SAMPLES


def _check_tables(data: bytes, length: int, depth: int) -> None:
    """As `check_mp4_tables`, for boxes that belong to a file of `length` bytes."""
    track, samples = _Track(), 0
    for number, (name, start, end) in enumerate(_all_boxes(data, 0, len(data), depth)):
        if number >= _MOST_BOXES:
            raise _implausible(f"the container has more than {_MOST_BOXES} boxes")
        if name == b"trak":
            samples += track.samples(length)
            track = _Track()
        elif name == b"hdlr":
            track.handlers.add(data[start + 8 : start + 12])
        elif name == b"cmov":
            _check_compressed(data, start, end, length, depth)
        elif name == b"trun":
            samples += _run_samples(data, start, end)
        elif name in (b"stsz", b"stz2"):
            size, count = _number(data, start + 4), _number(data, start + 8)
            if name == b"stsz" and size:
                track.sized.append((count, size))
            else:
                bits = 32 if name == b"stsz" else max(size & 0xFF, 4)
                _check(name.decode(), count, "samples", max(end - start - 12, 0) * 8 // bits, "the box")
        elif name in _ENTRY_BYTES:
            count, entry = _number(data, start + 4), _ENTRY_BYTES[name]
            _check(name.decode(), count, "entries", max(end - start - 8, 0) // entry, "the box")
            if name == b"stts":
                track.timings.append((count, _number(data, start + 12)))
                track.timed += int(_words(data, start + 8, count, 2)[:, 0].sum(dtype=np.uint64))
            elif name == b"stsc":
                track.runs.append(_words(data, start + 8, count, 3))
            elif name in (b"stco", b"co64"):
                track.chunks = max(track.chunks, count)
    samples += track.samples(length)
    _check("stsz and trun", samples, "samples", length, f"the {length} bytes of the file")


def _run_samples(data: bytes, start: int, end: int) -> int:
    """Samples of a trun box that take no byte of it, because all are as the defaults say. Raises: SampleError."""
    flags, count = _number(data, start) & 0xFFFFFF, _number(data, start + 4)
    if not flags & 0xF00:
        return count
    room = end - start - 8 - 4 * (flags & 0x5).bit_count()
    _check("trun", count, "samples", max(room, 0) // (4 * (flags & 0xF00).bit_count()), "the box")
    return 0


def _check_compressed(data: bytes, start: int, end: int, length: int, depth: int) -> None:
    """Raises: SampleError for what is wrong inside a compressed header, or for one that is a flood by itself."""
    most = max(length, _MOST_HEADER)
    try:
        header = zlib.decompressobj().decompress(memoryview(data)[start + 24 : end], most + 1)
    except zlib.error:  # nor can FFmpeg read it
        return
    if len(header) > most:
        raise _implausible(f"its compressed header (cmov) is longer than {most} bytes")
    if depth < _DEPTH:
        _check_tables(header, length, depth + 1)


def _check(table: str, count: int, things: str, most: int, holder: str) -> None:
    if count > most:
        raise _implausible(f"{table} claims {count} {things}, {holder} can hold {most}")


def _implausible(what: str) -> SampleError:
    return SampleError("corrupt", f"the mov container cannot be opened: {what}; replace the file or write it anew")


def _all_boxes(data: bytes, start: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """`boxes` as far as they are there, and theirs, each after its parent: what FFmpeg comes across while it opens an
    MP4 or MOV file."""
    for name, inner, stop in boxes(data, start, end):
        inner, stop = min(inner, end), min(stop, end)
        if name in (b"free", b"hoov") and data[inner + 4 : inner + 8] in (b"mvhd", b"cmov"):
            name = b"moov"  # a header set aside by an editor, which FFmpeg takes if there is no other
        yield name, inner, stop
        if depth >= _DEPTH:
            continue
        if name in _HOLDERS:
            yield from _all_boxes(data, inner, stop, depth + 1)
        elif name == b"meta":
            first = _find_word(data, b"hdlr", inner, stop)
            if first >= inner + 4:
                yield from _all_boxes(data, first - 4, stop, depth + 1)
        elif name == b"stsd":
            yield from _strewn_tables(data, inner, stop)


def _find_word(data: bytes, word: bytes, start: int, end: int) -> int:
    """Offset of four bytes that lie a multiple of four behind `start`; -1 if there are none."""
    at = data.find(word, start, end)
    while at >= 0 and (at - start) % 4:
        at = data.find(word, at + 1, end)
    return at


def _strewn_tables(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Sample tables inside stsd, whose entries carry boxes behind fields of a length that depends on the codec."""
    for table in _TABLES:
        at = data.find(table, start + 4, end)
        while at >= 0:
            name, inner, stop = next(boxes(data, at - 4, end), (b"", end, end))
            yield name, min(inner, end), min(stop, end)
            at = data.find(table, at + 4, end)


def _number(data: bytes, at: int) -> int:
    """Four bytes; those that are missing at the end of the data count as zero, as with FFmpeg."""
    return int.from_bytes(data[at : at + 4].ljust(4, b"\0"), "big")


def _words(data: bytes, start: int, rows: int, columns: int) -> np.ndarray:
    """A table of (rows, columns) 32-bit numbers inside the data, not copied."""
    return np.frombuffer(data, ">u4", rows * columns, start if rows else 0).reshape(rows, columns)
