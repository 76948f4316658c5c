"""Reading a group of shards for one lane: sample after sample by address, epoch after epoch, from any place on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Literal, NamedTuple

from univitar_ds.data.sampler.cursor import BufferedSample, ReadPosition
from univitar_ds.data.sampler.shard_assignment import ShardSlice, units_of_lane
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.captions import resolve
from univitar_ds.data.shards.index_cache import Entry, IndexCache, shard_samples
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import Sample, SizeRule, read_sample, read_sample_again
from univitar_ds.data.shards.sources import ShardGroup, SourceShard
from univitar_ds.data.storage.parallel import AT_ONCE, at_once
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Modality

Held = Literal["readable", "unreadable", "nothing"]
"""Of a group of shards: whether it has a readable sample of a modality, or none that is, or none at all."""
HINTED = 4
"""Shards that a storage is asked to prefetch; how many of them it fetches ahead is its own business."""


FILES_OF_A_GROUP = 2
"""Most files that a `Reader` keeps open: its shard, and once more where a part of it is scanned."""
_MOST_AGAIN = 256 << 20
"""Bytes of saved samples that are read at a time."""


class Found(NamedTuple):
    """A sample by address, before its content is looked at, or bytes that hold none any more.

    `shard` is an index into the run's shards; `samples` see `samples_in`.
    """

    shard: int
    entry: Entry
    ordinal: int
    epoch: int
    samples: int


class Reader:
    """The samples of one group of shards that belong to one lane, in its order.

    `place` is where it stands: a reader that starts there gives what this one gives next.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        group: ShardGroup,
        modality: Modality,
        *,
        lanes: int,
        lane: int,
        seed: int,
        place: ReadPosition,
        scans: IndexCache | None = None,
    ) -> None:
        """`scans` are those of all readers in this thread."""
        self.group = group
        self.place = place
        self._shards = shards
        self._modality: Modality = modality
        self._lanes, self._lane, self._seed = lanes, lane, seed
        self._scans = scans or IndexCache()
        self._entries = self._walk(place)

    def next(self) -> Found | None:
        """The next sample or stretch of damage; None at the end of an epoch.

        Raises: DataError if a shard cannot be read at all.
        """
        entry, self.place = next(self._entries)
        return entry

    def announce(self) -> None:
        """Announce the shard that is read first to its storage, before anybody waits for it."""
        units = self._units(self.place.epoch)[self.place.unit :]
        self._announce(-1, iter(units[:1]))

    def _walk(self, start: ReadPosition) -> Iterator[tuple[Found | None, ReadPosition]]:
        """Everything from `start` on, each with the place after it."""
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

    def _unit(self, unit: ShardSlice, start: ReadPosition) -> Iterator[tuple[Found, ReadPosition]]:
        """Of all who read the shard, the owner of the sample after some damage is the one that reports it."""
        shard = self._shards[unit.shard]
        for entry, ordinal in self._own_entries(shard, unit, start):
            place = ReadPosition(start.epoch, start.unit, entry.end, ordinal + isinstance(entry, tar_index.Group))
            if isinstance(entry, tar_index.Damage) and entry.end >= shard.size:
                place = ReadPosition(start.epoch, start.unit + 1)  # the same would be reported again from this byte on
            yield Found(unit.shard, entry, ordinal, start.epoch, samples_in(shard, entry, ordinal)), place

    def _own_entries(self, shard: Shard, unit: ShardSlice, start: ReadPosition) -> Iterator[tuple[Entry, int]]:
        """The unit's samples and damage from `start` on, with the number of the sample that it is or that follows.

        Units that are parts of a shard share a scan of it. One that was left in the middle goes on from that byte.
        """
        if unit.parts > 1 and not start.offset:
            yield from self._scans.part(shard, self._modality, unit.part, unit.parts)
            return
        ordinal = start.ordinal
        for entry in shard_samples(shard, self._modality, start.offset, ordinal):
            if ordinal % unit.parts == unit.part:
                yield entry, ordinal
            ordinal += isinstance(entry, tar_index.Group)

    def _units(self, epoch: int) -> list[ShardSlice]:
        name, shards = self.group.name, self.group.shards
        return units_of_lane(shards, self._lanes, self._lane, self._seed, self._modality, epoch, name)

    def _announce(self, current: int, units: Iterator[ShardSlice]) -> None:
        """Announce to the storages which shards come after `current`."""
        coming = dict.fromkeys(unit.shard for unit in itertools.islice(units, HINTED) if unit.shard != current)
        announce([self._shards[index] for index in coming])


def announce(shards: Sequence[Shard]) -> None:
    """Announce to the storages that these shards come next."""
    for storage in {id(shard.storage): shard.storage for shard in shards}.values():
        storage.prefetch([shard.path for shard in shards if shard.storage is storage])


def read_entry(shard: SourceShard, entry: Entry, rule: SizeRule, *, label_is_enough: bool = False) -> Sample:
    """The sample that was found, with at least one thing to say of it.

    `label_is_enough`: without made-up captions, so that one with a label only has none, as an evaluation needs it.
    Raises: SampleError for one to leave out, which all damage is; DataError if the shard itself cannot be read.
    """
    if isinstance(entry, tar_index.Damage):
        raise SampleError(entry.kind, entry.message)
    sample = with_captions(shard, read_sample(shard, entry, rule), label_is_enough=label_is_enough)
    if shard.watch is not None:
        shard.watch.see(sample.several_lines)
    return sample


def samples_in(shard: Shard, entry: Entry, ordinal: int) -> int:
    """How many samples this is: of damage how many it has likely held, at least 1.

    A manifest says at the shard's end how many are missing in all. Else those before the damage, `ordinal` of them,
    give it by their mean size.
    """
    if isinstance(entry, tar_index.Group):
        return 1
    if shard.samples is not None:
        held = shard.samples - ordinal if entry.end >= shard.size else 1
    else:
        held = (entry.end - entry.offset) * ordinal // max(entry.offset, 1)
    return max(1, held)


def read_again(
    shards: Sequence[SourceShard], rows: Sequence[BufferedSample], rule: SizeRule
) -> Iterator[Sample | SampleError | None]:
    """What each row of a cursor's pool is, in order; from a remote store many at a time.

    None where the address does not hold one sample any more, an error where the rule leaves the sample out.
    """

    def again(row: BufferedSample) -> Sample | SampleError | None:
        shard = shards[row.shard]
        try:
            sample = read_sample_again(shard, row.offset, row.length, rule)
            return None if sample is None else with_captions(shard, sample)
        except SampleError as error:
            return error

    most = min(AT_ONCE, _MOST_AGAIN // max([row.length for row in rows], default=1))
    return at_once(again, rows, [shards[row.shard].storage for row in rows], most)


def with_captions(shard: SourceShard, sample: Sample, *, label_is_enough: bool = False) -> Sample:
    """The sample with its label's name and its captions, made from its source's templates where it has none.

    `label_is_enough`: none are made. Raises: SampleError if nothing can be said of it.
    """
    templates = None if label_is_enough else shard.templates
    said, label, ignored = resolve(
        sample.captions, sample.label, sample.ignored, class_names=shard.class_names, templates=templates
    )
    kept = said is sample.captions and label is sample.label and ignored is sample.ignored
    return sample if kept else replace(sample, captions=said, label=label, ignored=ignored)


def scattered(shard: Shard, modality: Modality) -> str | None:
    """A sample of the shard whose members lie apart, so that each part looks like a sample of its own; else None."""
    keys: set[str] = set()
    for entry in shard_samples(shard, modality):
        if isinstance(entry, tar_index.Group):
            if entry.key in keys:
                return entry.key
            keys.add(entry.key)
    return None


def probe_group(shards: Sequence[SourceShard], group: ShardGroup, rule: SizeRule) -> Held:
    """What a group holds of the rule's modality; stops at the first sample that can be read."""
    held: Held = "nothing"
    for shard in (shards[index] for index in group.shards):
        for entry in shard_samples(shard, rule.modality):
            with suppress(SampleError):
                read_entry(shard, entry, rule)
                return "readable"
            if isinstance(entry, tar_index.Group):
                held = "unreadable"
    return held


def where_is(shard: Shard, entry: Entry) -> str:
    """Shard, key and byte, for messages."""
    key = f"/{entry.key}" if isinstance(entry, tar_index.Group) else ""
    return f"{shard.name}{key} at byte {entry.offset}"
