"""Reads the samples of a group for one lane, epoch by epoch, from any position."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from univitar_ds.data.media.prober import Prober, probe_each
from univitar_ds.data.sampler.cursor import ReadPosition
from univitar_ds.data.sampler.shard_assignment import ShardSlice, units_of_lane
from univitar_ds.data.sampler.stream_config import Held, StreamConfig
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.captions import resolve
from univitar_ds.data.shards.index_cache import Entry, shard_samples
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import (
    Sample,
    SampleAddress,
    SizeRule,
    check_condition,
    condition_fields,
    read_samples,
    read_samples_again,
)
from univitar_ds.data.shards.sources import ShardGroup, SourceShard
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality

HINTED = 4
"""Number of next shards in a prefetch hint; `data.s3.prefetch_shards` limits the downloads."""
BATCH = 32
"""Number of samples of a shard whose texts are read together."""
FILES_OF_A_GROUP = 2
"""Maximum number of files that a `Reader` keeps open: one for the shard, and one for the scan of a divided shard."""
_MOST_AGAIN = 256 << 20
"""Maximum bytes of saved samples that are read at a time."""


class BadSample(NamedTuple):
    """A sample that is left out, or damage: location, reason, and estimated number of lost `samples`."""

    where: str
    kind: str
    message: str
    samples: int


class Reader:
    """Reader of the samples of one group that belong to one lane.

    `place` is the position after the last sample. A new reader that starts there continues with the next sample.
    """

    def __init__(self, config: StreamConfig, group: ShardGroup, lane: int, place: ReadPosition) -> None:
        self.group = group
        self.place = place
        self._config = config
        self._lane = lane
        self._samples = self._walk(place)

    def next(self) -> Sample | BadSample | None:
        """Returns the next sample or bad sample; None at the end of an epoch.

        Raises: DataError if a shard cannot be read.
        """
        found, self.place = next(self._samples)
        return found

    def announce(self) -> None:
        """Prefetches the first shard."""
        units = self._units(self.place.epoch)[self.place.unit :]
        self._announce(-1, iter(units[:1]))

    def _walk(self, start: ReadPosition) -> Iterator[tuple[Sample | BadSample | None, ReadPosition]]:
        """Yields samples, bad samples and ends of epochs (None) from `start` on, each with the position after it."""
        first, offset, ordinal = start.unit, start.offset, start.ordinal
        units = self._units(start.epoch)
        for epoch in itertools.count(start.epoch):
            following = self._units(epoch + 1)
            for number in range(first, len(units)):
                self._announce(units[number].shard, itertools.chain(units[number + 1 :], following))
                yield from self._unit(units[number], ReadPosition(epoch, number, offset, ordinal))
                offset = ordinal = 0
            units, first, offset, ordinal = following, 0, 0, 0
            yield None, ReadPosition(epoch + 1)

    def _unit(self, unit: ShardSlice, start: ReadPosition) -> Iterator[tuple[Sample | BadSample, ReadPosition]]:
        """Yields the samples of a unit. If lanes share the shard, the lane with the sample after damage reports it."""
        shard = self._config.shards[unit.shard]
        entries = self._own_entries(shard, unit, start)
        for entry, ordinal, found in read_entries(shard, entries, self._config.size, self._config.probe):
            place = ReadPosition(start.epoch, start.unit, entry.end, ordinal + isinstance(entry, tar_index.Group))
            if isinstance(entry, tar_index.Damage) and entry.end >= shard.size:
                place = ReadPosition(start.epoch, start.unit + 1)  # a scan from this byte would report the damage again
            if isinstance(found, SampleError):
                cost = samples_in(shard, entry, ordinal)
                yield BadSample(where_is(shard, entry), found.kind, str(found), cost), place
                continue
            length = entry.end - entry.offset
            found.address = SampleAddress(unit.shard, entry.offset, length, ordinal, start.epoch)
            yield found, place

    def _own_entries(self, shard: Shard, unit: ShardSlice, start: ReadPosition) -> Iterator[tuple[Entry, int]]:
        """Yields the unit's samples and damage from `start` on, with the number of the present or following sample.

        Units of a divided shard share its scan. A unit that is resumed in the middle is scanned from that byte.
        """
        modality = self._config.modality
        if unit.parts > 1 and not start.offset:
            yield from self._config.index_cache.part(shard, modality, unit.part, unit.parts)
            return
        ordinal = start.ordinal
        for entry in shard_samples(shard, modality, start.offset, ordinal):
            if ordinal % unit.parts == unit.part:
                yield entry, ordinal
            ordinal += isinstance(entry, tar_index.Group)

    def _units(self, epoch: int) -> list[ShardSlice]:
        config, group = self._config, self.group
        return units_of_lane(group.shards, config.lanes, self._lane, config.seed, config.modality, epoch, group.name)

    def _announce(self, current: int, units: Iterator[ShardSlice]) -> None:
        """Prefetches the shards after `current`."""
        coming = dict.fromkeys(unit.shard for unit in itertools.islice(units, HINTED) if unit.shard != current)
        announce([self._config.shards[index] for index in coming])


def announce(shards: Sequence[Shard]) -> None:
    """Sends prefetch hints for the next shards to their storages."""
    for storage in {id(shard.storage): shard.storage for shard in shards}.values():
        storage.prefetch([shard.path for shard in shards if shard.storage is storage])


def read_entries(
    shard: SourceShard,
    entries: Iterable[tuple[Entry, int]],
    rule: SizeRule,
    probe: Prober = probe_each,
    *,
    label_is_enough: bool = False,
) -> Iterator[tuple[Entry, int, Sample | SampleError]]:
    """Yields each entry of a shard with its number, and its sample or the reason why it is left out.

    Entries are read `BATCH` at a time, so that probing their sizes takes one message to another process.
    `label_is_enough`: whether no captions are made from labels, for an evaluation.
    Raises: DataError if the shard cannot be read, after yielding the samples before that byte.
    """
    for batch in _batches(entries):
        groups = [(shard, entry) for entry, _ in batch if isinstance(entry, tar_index.Group)]
        samples = iter(read_samples(groups, rule, probe))
        for entry, number in batch:
            if isinstance(entry, tar_index.Damage):
                yield entry, number, SampleError(entry.kind, entry.message)
                continue
            found = next(samples)
            if isinstance(found, Sample):
                found = with_captions(shard, found, label_is_enough=label_is_enough)
            if isinstance(found, Sample) and shard.watch is not None:
                shard.watch.see(found.several_lines)
            yield entry, number, found


def _batches(entries: Iterable[tuple[Entry, int]]) -> Iterator[list[tuple[Entry, int]]]:
    """Yields lists of at most `BATCH` entries. An error of the iterator is raised after the entries before it."""
    entries = iter(entries)
    failure: DataError | None = None
    while failure is None:
        batch: list[tuple[Entry, int]] = []
        try:
            batch.extend(itertools.islice(entries, BATCH))
        except DataError as error:
            failure = error
        if batch:
            yield batch
        elif failure is None:
            return
    raise failure


def numbered(entries: Iterable[Entry]) -> Iterator[tuple[Entry, int]]:
    """Yields the entries of a whole shard, each with the number of its sample, or of the sample after damage."""
    number = 0
    for entry in entries:
        yield entry, number
        number += isinstance(entry, tar_index.Group)


def samples_in(shard: Shard, entry: Entry, ordinal: int) -> int:
    """Returns the number of samples of an entry: 1 for a sample; for damage an estimate, at least 1.

    With a manifest, the estimate for damage at the end of the shard is the number of missing samples, and 1 elsewhere.
    Without one, it follows from the mean size of the `ordinal` samples before the damage.
    """
    if isinstance(entry, tar_index.Group):
        return 1
    if shard.expected is not None:
        held = shard.expected - ordinal if entry.end >= shard.size else 1
    else:
        held = (entry.end - entry.offset) * ordinal // max(entry.offset, 1)
    return max(1, held)


def read_again(config: StreamConfig, rows: Sequence[SampleAddress]) -> Iterator[Sample | SampleError | None]:
    """Yields the samples at a cursor's addresses, in order. Reads many samples at a time from a remote store.

    Yields None for an address that no longer is a single sample, and an error for a sample that the stage does not
    allow.
    """
    most = max(1, min(BATCH, _MOST_AGAIN // max([row.length for row in rows], default=1)))
    for begin in range(0, len(rows), most):
        some = rows[begin : begin + most]
        ranges = [(config.shards[row.shard], row.offset, row.length) for row in some]
        for row, found in zip(some, read_samples_again(ranges, config.size, config.probe), strict=True):
            yield with_captions(config.shards[row.shard], found) if isinstance(found, Sample) else found


def with_captions(shard: SourceShard, sample: Sample, *, label_is_enough: bool = False) -> Sample | SampleError:
    """Returns the sample with the class name of its label, and captions from its source's templates if needed.

    `label_is_enough`: no captions are made from labels, and with one caption per line the lines after the first are
    `other_captions`. Returns an error if the sample has neither a caption nor a label, and one of the kind `FILTERED`,
    whose message is the rule, if its source's `where` leaves it out.
    """
    templates = None if label_is_enough else shard.templates
    try:
        texts, label, ignored = resolve(
            sample.captions, sample.label, sample.ignored, class_names=shard.class_names, templates=templates
        )
    except SampleError as error:
        return error
    others = texts[1:] if label_is_enough and shard.caption_lines else ()
    if shard.where is not None:
        about = {"width": sample.size.width, "height": sample.size.height, "frames": sample.size.frames}
        about |= {"duration_s": sample.size.duration_s, "label": label}
        try:
            check_condition(shard.where, {**about, **condition_fields(sample)})
        except SampleError as error:
            return error
    same = texts is sample.captions and label is sample.label and ignored is sample.ignored and not others
    return sample if same else replace(sample, captions=texts, label=label, ignored=ignored, other_captions=others)


def scattered(shard: Shard, modality: Modality) -> str | None:
    """Returns the key of a sample whose members are not consecutive, so that it looks like several; else None."""
    keys: set[str] = set()
    for entry in shard_samples(shard, modality):
        if isinstance(entry, tar_index.Group):
            if entry.key in keys:
                return entry.key
            keys.add(entry.key)
    return None


def held_by(config: StreamConfig, group: ShardGroup) -> Held:
    """Returns whether a group has samples of the modality (`Held`). Reads up to the first readable sample."""
    held: Held = "nothing"
    for shard in (config.shards[index] for index in group.shards):
        entries = numbered(shard_samples(shard, config.modality))
        for entry, _, found in read_entries(shard, entries, config.size, config.probe):
            if isinstance(found, Sample):
                return "readable"
            if isinstance(entry, tar_index.Group):
                held = "unreadable"
    return held


def where_is(shard: Shard, entry: Entry) -> str:
    """Returns shard, key and byte of an entry, for messages."""
    key = f"/{entry.key}" if isinstance(entry, tar_index.Group) else ""
    return f"{shard.name}{key} at byte {entry.offset}"
