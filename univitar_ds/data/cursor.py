"""Where a lane stands: small JSON that a checkpoint keeps, from which the lane goes on without replaying anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from univitar_ds.errors import DataError

VERSION = 1


class Waiting(NamedTuple):
    """A sample in the pool, by address: index of its shard, first byte, length in bytes, number within the shard,
    epoch it belongs to, packs it has seen leave without it."""

    shard: int
    offset: int
    length: int
    ordinal: int
    epoch: int
    waited: int


@dataclass(frozen=True)
class StreamCursor:
    """One modality of a lane: the next sample to read, the packs given out, and the samples read but not given out.

    `unit` counts within the lane's units of the epoch; `offset` is a byte of its shard, `ordinal` the number
    there of the next sample of the modality.
    """

    epoch: int = 0
    unit: int = 0
    offset: int = 0
    ordinal: int = 0
    packs: int = 0
    pool: tuple[Waiting, ...] = ()


@dataclass(frozen=True)
class LaneCursor:
    """A lane after `packs` packs. Streams that never gave a pack have no entry."""

    lane: int
    lanes: int
    seed: int
    fingerprint: str
    packs: int = 0
    streams: Mapping[str, StreamCursor] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        head = {"version": VERSION, "lane": self.lane, "lanes": self.lanes, "seed": self.seed}
        streams = {
            modality: _stream_to_json(self.streams[modality]) if modality in self.streams else None
            for modality in ("image", "video")
        }
        return {**head, "fingerprint": self.fingerprint, "packs": self.packs, **streams}

    def expect(self, *, lane: int, lanes: int, seed: int, fingerprint: str) -> LaneCursor:
        """The cursor itself, if it belongs to this run.

        Raises: DataError that names what differs and what to do.
        """
        told = {"lane": (self.lane, lane), "data.lanes": (self.lanes, lanes), "seed": (self.seed, seed)}
        for name, (saved, given) in told.items():
            if saved != given:
                raise DataError(f"the saved data cursor has {name} {saved}, this run {given}; resume with {saved}")
        if self.fingerprint != fingerprint:
            raise DataError(
                f"the sources have changed since the data cursor was saved (fingerprint {self.fingerprint}, now "
                f"{fingerprint}): restore the same shards in the same order, or start a new run"
            )
        return self


def parse(document: Any) -> LaneCursor:
    """The cursor in a JSON document.

    Raises: DataError if it is not one or has another version.
    """
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise DataError(
            f"the data cursor has version {version!r}, this program reads {VERSION}; "
            "resume with the program that wrote it"
        )
    try:
        streams = {
            modality: _stream_from_json(document[modality])
            for modality in ("image", "video")
            if document[modality] is not None
        }
        numbers = {name: _count(document[name]) for name in ("lane", "lanes", "seed", "packs")}
        return LaneCursor(**numbers, fingerprint=str(document["fingerprint"]), streams=streams)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the data cursor is damaged ({error!r}); resume from another checkpoint") from error


def _stream_to_json(stream: StreamCursor) -> dict[str, Any]:
    numbers = {name.name: getattr(stream, name.name) for name in fields(stream) if name.name != "pool"}
    return {**numbers, "pool": [list(row) for row in stream.pool]}


def _stream_from_json(document: Mapping[str, Any]) -> StreamCursor:
    pool = tuple(Waiting(*map(_count, row)) for row in document["pool"])
    numbers = {name: _count(value) for name, value in document.items() if name != "pool"}
    return StreamCursor(**numbers, pool=pool)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
