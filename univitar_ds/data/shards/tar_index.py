"""Finds the samples of a tar shard: their offsets and members, without reading the content of media.

A sample is a run of consecutive members with the same key: the name up to the first dot after the last slash
(WebDataset). The bytes of a sample are one range of the shard, which can be read again without the bytes before it.
Damaged and truncated parts are reported with their range, and the scan continues at the next header. Formats: ustar,
GNU (long names, large numbers) and pax.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import BinaryIO, NamedTuple, NoReturn
from zlib import adler32

from univitar_ds.errors import DataError

BLOCK = 512
HEADER_TEXT_LIMIT = 1 << 20
"""Maximum size in bytes of an extended header (pax records, GNU long name)."""
TAIL_LIMIT = 1 << 16
"""Maximum size in bytes of the end marker with padding. Tar programs pad to 10 KiB; more zeros replaced samples."""

SMALL = 2048
"""Maximum size in bytes of members whose content comes with them: a stream has buffered it with their header."""

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_WITHOUT_CONTENT = (*_LINKS, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
_LONG_NAME, _PAX = (tarfile.GNUTYPE_LONGNAME,), (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_LONG_NAME, *_PAX, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_ZERO_BLOCK = bytes(BLOCK)
_MAGIC, _MAGIC_AT = b"ustar", 257
_SEARCH_BYTES = (4 << 10, 1 << 20)
"""Size of the first and of the largest read of a search for a header; the next header is usually near."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
_RESTORE = "restore the shard or pack it again"
SORT_HINT = "the members of a sample must follow one another: write the tar sorted by name (tar --sort=name)"


class Member(NamedTuple):
    """A file in a tar: extension in lower case ("" if none), offset and length of the content in bytes.

    `link`: whether the member is a hard or symbolic link, which has no content. `content`: the content of a file of at
    most `SMALL` bytes; None if it is larger, cut off or a link."""

    extension: str
    offset: int
    length: int
    link: bool = False
    content: bytes | None = None


@dataclass
class Group:
    """The members of one sample. `offset` is the byte of its first header, `end` the byte after its last member."""

    key: str
    offset: int
    end: int
    members: list[Member] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.end - self.offset


@dataclass(frozen=True)
class Damage:
    """Bytes [offset, end) of a shard that contain no readable sample. `message` names the shard and the byte.

    `kind` is "cut" if the shard ends too early, else "damaged"."""

    kind: str
    offset: int
    end: int
    message: str


class _Entry(NamedTuple):
    name: str
    kind: bytes
    start: int
    data: int
    length: int
    end: int
    content: bytes | None


class _Lost(Exception):
    """A member cannot be read. The next header is at `search` or later; None: it may be inside the previous member."""

    def __init__(self, kind: str, message: str, search: int | None) -> None:
        super().__init__(message)
        self.kind, self.message, self.search = kind, message, search


def scan(stream: BinaryIO, name: str, size: int, start: int = 0) -> Iterator[Group | Damage]:
    """Yields the samples of a shard in order, and the damage between them. Content is skipped.

    After damage the scan continues at the next header (at a multiple of BLOCK, with valid checksum and magic). A sample
    that certainly lost a member is part of the damage. A sample next to the damage is yielded with the members that
    were found, although some may be missing. A scan from any `Group.end` or `Damage.end` yields the same as the
    rest of the whole scan. Nothing follows damage that reaches the end of the shard.

    Args: stream: seekable, `read` returns all requested bytes; name: name of the shard in messages; size: its size in
        bytes; start: the byte to start at: 0, a `Group.end` or a `Damage.end`.
    Raises: only errors of the stream."""
    return _grouped(_events(stream, name, size, start, whole=True))


def groups(stream: BinaryIO, name: str, size: int, start: int = 0) -> Iterator[Group]:
    """Yields the samples of a shard that must be intact; see `scan`.

    Raises: DataError with shard and byte if the shard is truncated or a header is damaged."""
    for found in scan(stream, name, size, start):
        if isinstance(found, Damage):
            raise DataError(found.message)
        yield found


def group_of_range(stream: BinaryIO, name: str, size: int, origin: int) -> Group | None:
    """Returns the sample in a range that was read from byte `origin`, with offsets relative to the range; None if the
    range is not exactly one sample."""
    return group_between(stream, f"{name} (range from byte {origin})", 0, size)


def group_between(stream: BinaryIO, name: str, begin: int, end: int) -> Group | None:
    """Returns the single sample in bytes [begin, end) of a stream; None if they are not exactly one sample."""
    found = list(_grouped(_events(stream, name, end, begin, whole=False)))
    if len(found) == 1 and isinstance(found[0], Group) and (found[0].offset, found[0].end) == (begin, end):
        return found[0]
    return None


def split_name(path: str) -> tuple[str, str] | None:
    """Returns (key, extension) of a member, "" without an extension; None for a hidden file (.name)."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else None


def _grouped(events: Iterator[_Entry | Damage]) -> Iterator[Group | Damage]:
    """Groups members by key. `damage` follows `current` and contains all members of the sample `lost`."""
    current: Group | None = None
    damage: Damage | None = None
    lost: str | None = None
    for event in events:
        if isinstance(event, Damage):
            if current is not None and event.offset < current.end:
                event, lost, current = replace(event, offset=current.offset), current.key, None
            damage = event if damage is None else replace(damage, end=event.end)
            continue
        link = event.kind in _LINKS
        named = split_name(event.name) if link or event.kind in _REGULAR else None
        if named is None:
            continue
        key, extension = named
        if damage is not None:
            if current is not None and current.key == key:
                damage, lost, current = replace(damage, offset=current.offset), key, None
            if key == lost:
                damage = replace(damage, end=event.end)
                continue
        if current is not None and current.key != key:
            yield current
            current = None
        if damage is not None:
            yield damage
            damage = lost = None
        if current is None:
            current = Group(key, event.start, event.end)
        current.members.append(Member(extension, event.data, 0 if link else event.length, link, event.content))
        current.end = event.end
    if current is not None:
        yield current
    if damage is not None:
        yield damage


def _events(stream: BinaryIO, name: str, size: int, start: int, *, whole: bool) -> Iterator[_Entry | Damage]:
    """Yields members from `start` on. If `whole`, the shard must end with the end marker, else with its last member.

    A member is yielded before the next header is read. If there is no header at its end but one inside it, the member
    lost some of its content; the damage that is then yielded begins at the member's offset and so replaces it.
    """
    last: _Entry | None = None
    begin = start
    while whole or begin < size:
        try:
            entry = _read_entry(stream, name, size, begin)
            if entry is None:
                return
            yield entry
            if entry.end > size:
                _cut(name, size, f"inside member {entry.name!r} that begins at byte {begin}", entry.data)
            last, begin = entry, entry.end
        except _Lost as fault:
            search = fault.search or (begin + BLOCK if last is None else last.data)
            found = _next_header(stream, size, search)
            kind, offset, message = fault.kind, begin, fault.message
            if found is not None and (found < begin or kind == "cut"):
                kind, offset = "damaged", last.start if last is not None and found < begin else begin
                message = _message(name, offset, f"that member is incomplete, another begins inside it at byte {found}")
            yield Damage(kind, offset, size if found is None else found, message)
            if found is None:
                return
            last, begin = None, found


def _read_entry(stream: BinaryIO, name: str, size: int, begin: int) -> _Entry | None:
    """Returns the member that begins at `begin`, after its extended headers; None at a valid end marker.

    Raises: _Lost."""
    position = begin
    search: int | None = None
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        stream.seek(position)
        block = stream.read(max(0, min(BLOCK, size - position)))
        if block == _ZERO_BLOCK and position == begin:
            _check_end(stream, name, size, position)
            return None
        info = _header(block, name, position, search)
        search = data = position + BLOCK
        length = _number(pax["size"], name, position) if "size" in pax else info.size
        if length < 0:
            _damaged(name, position, f"a member of {length} bytes", data)
        end = data if info.type in _WITHOUT_CONTENT else data + -(-length // BLOCK) * BLOCK
        if info.type in _EXTENDED:
            if length > HEADER_TEXT_LIMIT:
                _damaged(name, position, f"an extended header of {length} bytes (limit {HEADER_TEXT_LIMIT})", data)
            if end > size:
                _cut(name, size, f"inside the extended header that begins at byte {position}", data)
            text = stream.read(length)
            if info.type in _LONG_NAME:
                long_name = text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type in _PAX:
                pax = _pax_records(text, name, position)
        elif info.type == tarfile.GNUTYPE_SPARSE or (pax and any(key.startswith("GNU.sparse") for key in pax)):
            _damaged(name, position, f"a sparse member {info.name!r}, which shards never need", data)
        else:
            path = pax.get("path") or long_name or info.name
            content = stream.read(length) if length <= SMALL and info.type in _REGULAR and end <= size else None
            return _Entry(path, info.type, begin, data, length, end, content)
        position = end


class _PlainHeader(NamedTuple):
    """The used fields of a `tarfile.TarInfo`."""

    name: str
    type: bytes
    size: int


_plain_fields = Struct("100s24x12s12x8ss100x8s80xB").unpack_from
"""Unpacks name, size, checksum, type, magic with version, and the first byte of the name prefix."""


def _plain_header(block: bytes) -> _PlainHeader | None:
    """Parses the header of a regular file in a sixth of tarfile's time; returns None if tarfile must parse it."""
    name, size, checksum, kind, magic, prefix = _plain_fields(block)
    digits, detail = size[:11], checksum[:6]
    if kind != tarfile.REGTYPE or magic != b"ustar\x0000" or prefix or checksum[6:] != b"\0 ":
        return None
    if not (digits.isdigit() and detail.isdigit()):
        return None
    try:
        if _sum(block) - sum(checksum) + 8 * 0x20 != int(detail, 8):
            return None
        return _PlainHeader(name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), kind, int(digits, 8))
    except ValueError:  # a digit above 7
        return None


def _sum(block: bytes) -> int:
    """Returns the sum of a block's bytes, five times faster than `sum`.

    The low half of Adler-32 is 1 plus the sum modulo 65,521, and 256 bytes add up to at most 65,280."""
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2


def _header(block: bytes, name: str, position: int, search: int | None) -> tarfile.TarInfo | _PlainHeader:
    if len(block) < BLOCK:
        _cut(name, position + len(block), "before its end marker" if not block else "inside a header", search)
    if (plain := _plain_header(block)) is not None:
        return plain
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        what = f"no valid tar header there ({error})"
        packed = next((by for magic, by in _COMPRESSED.items() if not position and block.startswith(magic)), None)
        if packed is not None:
            what = f"it is compressed with {packed}, but shards are read by random access; decompress it"
        _damaged(name, position, what, search)


def _check_end(stream: BinaryIO, name: str, size: int, position: int) -> None:
    """Checks that only zeros follow: at least two blocks. In concatenated archives there is data after the marker."""
    rest = stream.read(min(size - position, TAIL_LIMIT) - BLOCK)
    if any(rest[:BLOCK]):
        _damaged(name, position, "a block of zeros in the middle of the shard", None)
    if any(rest):
        _damaged(name, position, "more data after the end marker (several tars joined into one?)", None)
    if len(rest) < BLOCK:
        _cut(name, position + BLOCK + len(rest), "inside its end marker", None)
    if size - position > TAIL_LIMIT:
        _damaged(name, position, f"more than {TAIL_LIMIT} bytes of zeros, longer than an end marker", None)


def _next_header(stream: BinaryIO, size: int, start: int) -> int | None:
    """Returns the byte of the first header at `start` or any number of blocks after it; None if there is none."""
    stream.seek(start)
    length, longest = _SEARCH_BYTES
    while start < size:
        chunk = stream.read(min(length, size - start))
        magic = chunk.find(_MAGIC, _MAGIC_AT)
        while magic >= 0:
            header = magic - _MAGIC_AT
            if header % BLOCK == 0 and _is_header(chunk[header : header + BLOCK]):
                return start + header
            magic = chunk.find(_MAGIC, magic + 1)
        if len(chunk) < length:
            return None
        start, length = start + length, min(2 * length, longest)
    return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _pax_records(text: bytes, name: str, position: int) -> dict[str, str]:
    """Parses records of the form b"LENGTH KEY=VALUE newline", where LENGTH counts the whole record."""
    records = {}
    while text.strip(b"\0"):
        digits, space, _ = text.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = text[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or length > len(text) or text[length - 1 : length] != b"\n":
            _damaged(name, position, "a pax header that does not parse", position + BLOCK)
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[length:]
    return records


def _number(text: str, name: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _damaged(name, position, f"a pax size of {text[:40]!r}", position + BLOCK)
    return int(text)


def _cut(name: str, byte: int, where: str, search: int | None) -> NoReturn:
    raise _Lost("cut", f"shard {name}: cut off at byte {byte}, {where}; {_RESTORE}", search)


def _damaged(name: str, position: int, what: str, search: int | None) -> NoReturn:
    raise _Lost("damaged", _message(name, position, what), search)


def _message(name: str, position: int, what: str) -> str:
    return f"shard {name}: damaged at byte {position}: {what}; {_RESTORE}"
