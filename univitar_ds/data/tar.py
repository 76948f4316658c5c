"""Tar shards read by address: where every sample begins and ends, and nothing of its content.

A sample is a run of members that share a key: the name up to the first dot after the last slash
(WebDataset). Its bytes are one range of the shard, so it can be fetched again without reading what
comes before. A shard that is damaged or cut off is an error with its byte, never a short shard.
Formats: ustar, GNU (long names, large numbers) and pax.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from univitar_ds.errors import DataError

BLOCK = 512
HEADER_TEXT_LIMIT = 1 << 20
"""Longest extended header (pax records, GNU long name) that is believed."""

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_LONG_NAME, _PAX = (tarfile.GNUTYPE_LONGNAME,), (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENDED = (*_LONG_NAME, *_PAX, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
_ZERO_BLOCK = bytes(BLOCK)


@dataclass(frozen=True)
class Member:
    """One regular file: its extension in lower case and where its content lies, in bytes of the shard."""

    extension: str
    offset: int
    length: int


@dataclass
class Group:
    """The members of one sample. `offset` is where its first header begins, `end` where the next sample may begin."""

    key: str
    offset: int
    end: int
    members: list[Member] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.end - self.offset


@dataclass(frozen=True)
class _Entry:
    name: str
    regular: bool
    start: int
    data: int
    length: int
    end: int


def groups(stream: BinaryIO, name: str, size: int, start: int = 0) -> Iterator[Group]:
    """The samples of a shard in order, content skipped.

    Args: a seekable stream of the shard; its name for messages; its size in bytes; the byte of a header to
    start at (0 or a `Group.end`).
    Raises: DataError with shard and byte if the shard is cut (in a header, in content, before the end
    marker) or a header is damaged.
    """
    return _grouped(_entries(stream, name, size, start, whole=True))


def group_of_range(stream: BinaryIO, name: str, size: int, origin: int) -> Group | None:
    """The single sample that a range fetched from byte `origin` holds, with offsets relative to the range.

    None if the range holds no sample or several: it is not what its address says.
    """
    try:
        found = list(_grouped(_entries(stream, f"{name} (range from byte {origin})", size, 0, whole=False)))
    except DataError:
        return None
    return found[0] if len(found) == 1 and found[0].length == size else None


def split_name(path: str) -> tuple[str, str] | None:
    """(key, extension) of a member; None for a name without an extension or that begins with a dot."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and extension else None


def _grouped(entries: Iterator[_Entry]) -> Iterator[Group]:
    current: Group | None = None
    for entry in entries:
        named = split_name(entry.name) if entry.regular else None
        if named is None:
            continue
        key, extension = named
        if current is not None and current.key != key:
            yield current
            current = None
        if current is None:
            current = Group(key, entry.start, entry.end)
        current.members.append(Member(extension, entry.data, entry.length))
        current.end = entry.end
    if current is not None:
        yield current


def _entries(stream: BinaryIO, name: str, size: int, start: int, *, whole: bool) -> Iterator[_Entry]:
    """Members from `start` on. A `whole` shard must close with the end marker, a range ends with its last member."""
    stream.seek(start)
    position = begin = start
    long_name: str | None = None
    pax: dict[str, str] = {}
    while whole or position < size:
        block = stream.read(BLOCK)
        if block == _ZERO_BLOCK and begin == position:
            _check_end(stream, name, position)
            return
        info = _header(block, name, position)
        data = position + BLOCK
        length = _number(pax["size"], name, position) if "size" in pax else info.size
        if length < 0:
            raise _damaged(name, position, f"a member of {length} bytes")
        end = data if info.type in _WITHOUT_CONTENT else data + -(-length // BLOCK) * BLOCK
        if end > size:
            raise DataError(
                f"shard {name}: cut off at byte {size}, inside member {info.name!r} that begins at byte {begin} "
                f"and ends at byte {end}; restore the shard or pack it again"
            )
        if info.type in _EXTENDED:
            if length > HEADER_TEXT_LIMIT:
                raise _damaged(name, position, f"an extended header of {length} bytes (limit {HEADER_TEXT_LIMIT})")
            text = stream.read(length)
            if info.type in _LONG_NAME:
                long_name = text.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif info.type in _PAX:
                pax = _pax_records(text, name, position)
        elif info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
            raise _damaged(name, position, f"a sparse member {info.name!r}, which shards never need")
        else:
            yield _Entry(pax.get("path") or long_name or info.name, info.type in _REGULAR, begin, data, length, end)
            long_name, pax, begin = None, {}, end
        stream.seek(end)
        position = end


def _header(block: bytes, name: str, position: int) -> tarfile.TarInfo:
    if len(block) < BLOCK:
        where = "before its end marker" if not block else "inside a header"
        raise DataError(
            f"shard {name}: cut off at byte {position + len(block)}, {where}; restore the shard or pack it again"
        )
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _damaged(name, position, f"no valid tar header there ({error})") from error


def _check_end(stream: BinaryIO, name: str, position: int) -> None:
    """The end marker is two blocks of zeros; archives glued together would hide all but the first."""
    second = stream.read(BLOCK)
    if len(second) < BLOCK:
        raise DataError(
            f"shard {name}: cut off at byte {position + BLOCK + len(second)}, inside its end marker; "
            "restore the shard or pack it again"
        )
    if second != _ZERO_BLOCK:
        raise _damaged(name, position, "a block of zeros in the middle of the shard")
    if any(stream.read(BLOCK)):
        raise _damaged(name, position, "more data after the end marker (several tars joined into one?)")


def _pax_records(text: bytes, name: str, position: int) -> dict[str, str]:
    """Records of the form b"LENGTH KEY=VALUE newline", LENGTH counting the whole record."""
    records = {}
    while text.strip(b"\0"):
        digits, space, _ = text.partition(b" ")
        length = int(digits) if space and digits.isdigit() and len(digits) < 8 else 0
        key, equals, value = text[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or length > len(text) or text[length - 1 : length] != b"\n":
            raise _damaged(name, position, "a pax header that does not parse")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[length:]
    return records


def _number(text: str, name: str, position: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _damaged(name, position, f"a pax size of {text[:40]!r}")
    return int(text)


def _damaged(name: str, position: int, what: str) -> DataError:
    return DataError(f"shard {name}: damaged at byte {position}: {what}; restore the shard or pack it again")
