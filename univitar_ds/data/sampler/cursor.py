"""The position of a lane as small JSON for checkpoints. A lane continues from it without reading samples again."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from univitar_ds.data.sampler.bad_samples import INITIAL_STATE
from univitar_ds.data.shards.listing import warn_once
from univitar_ds.data.shards.samples import SampleAddress
from univitar_ds.data.shards.tar_index import BLOCK
from univitar_ds.errors import DataError
from univitar_ds.geometry import MODALITIES

VERSION = 3
EPOCH_STRIDE = 1 << 20
"""A group that is new in a stage begins at an epoch that is a multiple of this number, equal in all lanes and not used
by earlier stages. So a sample that an earlier stage read in another group gets new random numbers."""
_RESTART = 1 << 10
"""Number of multiples of EPOCH_STRIDE skipped if the sources have changed; larger than the number of groups."""


class ReadPosition(NamedTuple):
    """The position of a lane in one group of shards.

    `unit` is an index into the lane's units of the epoch, `offset` a byte of the unit's shard, `ordinal` the number of
    the next sample of the modality in the shard, `credit` the group's credit in `mixture.WeightedRoundRobin`.
    """

    epoch: int = 0
    unit: int = 0
    offset: int = 0
    ordinal: int = 0
    credit: int = 0


@dataclass(frozen=True)
class StreamCursor:
    """The position of one modality of a lane after `packs` packs.

    `places` maps each group to its position, also groups that the present stage does not read. `pool` lists the samples
    in the shuffle buffer, oldest first. `reading` is the state of the `BadSampleMonitor` for reading. `empty` lists
    groups that were found to have no sample of the modality.
    """

    packs: int = 0
    places: Mapping[str, ReadPosition] = field(default_factory=dict)
    pool: tuple[SampleAddress, ...] = ()
    reading: tuple[int, ...] = INITIAL_STATE
    empty: tuple[str, ...] = ()

    def restarted(self) -> StreamCursor:
        """Returns the cursor for changed sources: every group at a new epoch, and an empty shuffle buffer."""
        places = {
            name: ReadPosition((place.epoch // EPOCH_STRIDE + _RESTART) * EPOCH_STRIDE)
            for name, place in self.places.items()
        }
        return replace(self, places=places, pool=(), empty=())


@dataclass(frozen=True)
class LaneCursor:
    """The position of a lane after `packs` packs. Streams without packs have no entry.

    `decoding` is the state of the decoding `BadSampleMonitor` of each modality; `collate.DecodingMonitor` sets it.
    """

    lane: int
    lanes: int
    seed: int
    fingerprint: str
    packs: int = 0
    streams: Mapping[str, StreamCursor] = field(default_factory=dict)
    decoding: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the cursor as JSON, about 1 KB with 192 samples in the shuffle buffer."""
        head = {"version": VERSION, "lane": self.lane, "lanes": self.lanes, "seed": self.seed}
        streams = {name: _stream_to_json(self.streams[name]) for name in MODALITIES if name in self.streams}
        decoding = {name: list(self.decoding[name]) for name in MODALITIES if name in self.decoding}
        return {**head, "fingerprint": self.fingerprint, "packs": self.packs, "streams": streams, "decoding": decoding}

    def expect(
        self,
        *,
        lane: int,
        lanes: int,
        seed: int,
        fingerprint: str,
        accept_changed_sources: bool = False,
        warns: bool = True,
    ) -> LaneCursor:
        """Checks that the cursor belongs to this run. Returns it, at a new epoch if sources have changed.

        Args: warns: whether to log a warning if sources have changed, once per process.
        Raises: DataError with the difference and the remedy.
        """
        pairs = {"lane": (self.lane, lane), "data.lanes": (self.lanes, lanes), "seed": (self.seed, seed)}
        for name, (saved, given) in pairs.items():
            if saved != given:
                raise DataError(f"the saved data cursor has {name} {saved}, this run {given}; resume with {saved}")
        # Cursors of earlier versions have only the first part of the fingerprint.
        if self.fingerprint in (fingerprint, fingerprint.partition(":")[0]):
            return replace(self, fingerprint=fingerprint)
        if not accept_changed_sources:
            raise DataError(
                f"the sources have changed since the data cursor was saved (fingerprint {self.fingerprint}, now "
                f"{fingerprint}): restore the same shards in the same order, set data.accept_changed_sources to "
                "continue with the next epoch of the new ones, or start a new run"
            )
        if warns:
            warn_once(
                f"the sources have changed since the data cursors were saved (fingerprint {self.fingerprint}, now "
                f"{fingerprint}); the rest of the epoch is skipped and the next begins (data.accept_changed_sources)"
            )
        streams = {name: stream.restarted() for name, stream in self.streams.items()}
        return replace(self, fingerprint=fingerprint, streams=streams)


def parse(document: Any) -> LaneCursor:
    """Returns the cursor in a JSON document.

    Raises: DataError if the document is not a cursor or has another version.
    """
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise DataError(
            f"the data cursor has version {version!r}, this program reads {VERSION}; "
            "resume with the program that wrote it"
        )
    try:
        streams = {_modality(name): _stream_from_json(part) for name, part in document["streams"].items()}
        decoding = {_modality(name): _monitor_state(part) for name, part in document["decoding"].items()}
        numbers = {name: _count(document[name]) for name in ("lane", "lanes", "seed", "packs")}
        return LaneCursor(**numbers, fingerprint=str(document["fingerprint"]), streams=streams, decoding=decoding)
    except (AttributeError, KeyError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"the data cursor is damaged ({error!r}); resume from another checkpoint") from error


def _stream_to_json(stream: StreamCursor) -> dict[str, Any]:
    places = {name: list(place) for name, place in sorted(stream.places.items())}
    return {
        "packs": stream.packs,
        "places": places,
        "reading": list(stream.reading),
        "empty": list(stream.empty),
        "pool": write_pool(stream.pool, stream.packs),
    }


def _stream_from_json(document: Mapping[str, Any]) -> StreamCursor:
    places = {
        str(name): ReadPosition(*map(_count, numbers), credit=_integer(credit))
        for name, (*numbers, credit) in document["places"].items()
    }
    packs = _count(document["packs"])
    return StreamCursor(
        packs,
        places,
        read_pool(document["pool"], packs),
        _monitor_state(document["reading"]),
        tuple(map(str, document["empty"])),
    )


_BARE = -15
"""`wbits` for deflate without zlib's header and checksum."""
_CHECK_BYTES = 4
_MAX_BYTES = 1 << 26
"""Maximum size in bytes of a decompressed shuffle buffer in a valid cursor."""
_SMALL = [bytes([number]) for number in range(0x80)]


def write_pool(rows: Sequence[SampleAddress], packs: int) -> str:
    """Encodes the samples of the shuffle buffer: differences between rows, by column, as varints, deflated, base 85.

    The text has about 4 bytes per row; a list of numbers would have 40. `since` is stored as `packs - since`.
    """
    columns = zip(*_steps(rows, packs), strict=True)
    numbers = [number for column in columns for number in column]
    packed = b"".join([_SMALL[number] if number < 0x80 else _varint(number) for number in numbers])
    check = zlib.crc32(packed).to_bytes(_CHECK_BYTES)  # zlib's Adler-32 is weak for so few bytes
    return base64.b85encode(check + zlib.compress(packed, wbits=_BARE)).decode()


def read_pool(text: str, packs: int) -> tuple[SampleAddress, ...]:
    """Decodes a result of `write_pool`. Raises: ValueError or zlib.error if the text is damaged."""
    data = base64.b85decode(text)
    inflating = zlib.decompressobj(_BARE)
    packed = inflating.decompress(data[_CHECK_BYTES:], _MAX_BYTES)
    whole = inflating.eof and not inflating.unused_data
    if not whole or zlib.crc32(packed).to_bytes(_CHECK_BYTES) != data[:_CHECK_BYTES]:
        raise ValueError("the checksum of the shuffle buffer is wrong")
    numbers = list(_varints(packed))
    width = len(SampleAddress._fields)
    if len(numbers) % width:
        raise ValueError(f"{len(numbers)} numbers in rows of {width}")
    n = len(numbers) // width
    columns = (numbers[column * n : (column + 1) * n] for column in range(width))
    return tuple(_rows(zip(*columns, strict=True), packs))


def _steps(rows: Iterable[SampleAddress], packs: int) -> Iterator[tuple[int, ...]]:
    """Yields the differences between rows. Offsets and ordinals are relative to the last row of the same shard."""
    shard = epoch = waited = 0
    last: dict[int, tuple[int, int]] = {}
    for row in rows:
        block, length = _blocks(row.offset), _blocks(row.length)
        before, ordinal = last.get(row.shard, (0, 0))
        longer = packs - row.since - waited
        signed = (row.shard - shard, block - before, row.ordinal - ordinal, row.epoch - epoch, longer)
        yield length, *map(_unsigned, signed)
        last[row.shard] = block + length, row.ordinal
        shard, epoch, waited = row.shard, row.epoch, waited + longer


def _rows(steps: Iterable[tuple[int, ...]], packs: int) -> Iterator[SampleAddress]:
    """Yields the rows with these differences, as the inverse of `_steps`."""
    shard = epoch = waited = 0
    last: dict[int, tuple[int, int]] = {}
    for length, *unsigned in steps:
        signed = list(map(_signed, unsigned))
        shard, epoch, waited = shard + signed[0], epoch + signed[3], waited + signed[4]
        before, ordinal = last.get(shard, (0, 0))
        block, ordinal = before + signed[1], ordinal + signed[2]
        numbers = (shard, block * BLOCK, length * BLOCK, ordinal, epoch, packs - _count(waited))
        yield SampleAddress(*map(_count, numbers))
        last[shard] = block + length, ordinal


def _blocks(value: int) -> int:
    assert value % BLOCK == 0, f"byte {value} of a shard is not at the start of a block"
    return value // BLOCK


def _unsigned(value: int) -> int:
    """Maps 0, -1, 1, -2, ... to 0, 1, 2, 3, ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def _signed(value: int) -> int:
    return -(value + 1 >> 1) if value & 1 else value >> 1


def _varint(value: int) -> bytes:
    """Encodes a number with seven bits per byte, lowest first. The top bit is set if another byte follows."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _varints(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            yield value
            value = shift = 0
    if shift:
        raise ValueError("the last number is truncated")


def _modality(name: str) -> str:
    if name not in MODALITIES:
        raise ValueError(f"{name!r} is not a modality")
    return name


def _monitor_state(state: Sequence[Any]) -> tuple[int, ...]:
    if len(state) != len(INITIAL_STATE):
        raise ValueError(f"{state!r} is not a state of a BadSampleMonitor")
    return tuple(map(_count, state))


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not an integer")
    return value


def _count(value: Any) -> int:
    if _integer(value) < 0:
        raise ValueError(f"{value!r} is negative")
    return value
