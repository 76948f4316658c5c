"""Lanes: deterministic, endless streams of packs. No pixels, no processes: a lane plans, others decode.

Which samples a lane gives, and in which packs, depends on the seed, the sources, the number of lanes and the
stage's rules. The number of ranks, of decoding processes and their timing have no part in it, so any rank can
take up any lane where its cursor says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from univitar_ds.data.sampler import packing
from univitar_ds.data.sampler.bad_samples import BadSampleMonitor
from univitar_ds.data.sampler.cursor import EPOCH_STRIDE, LaneCursor, ReadPosition, StreamCursor
from univitar_ds.data.sampler.mixture import WeightedRoundRobin
from univitar_ds.data.sampler.reader import BadSample, Held, Reader, held_by, read_again, scattered
from univitar_ds.data.sampler.stream_config import StreamConfig
from univitar_ds.data.shards.samples import Sample, SampleAddress
from univitar_ds.data.shards.sources import EVERYTHING, ShardGroup
from univitar_ds.data.shards.tar_index import SORT_HINT
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality
from univitar_ds.randomness import draw

_log = logging.getLogger(__name__)

_64_BITS = (1 << 64) - 1
WELL_FILLED = 0.9
"""A pack emptier than this because of weights is reported."""
LONG_WAIT = 64
"""Packs after which a sample leaves before those that keep their source from reading on."""
POOL_BUDGETS = 2
"""The pool also holds at least so many token budgets, so that small items fill a pack too."""


@dataclass(frozen=True)
class Plan:
    """A pack before decoding. `bad` counts unreadable samples met while planning, `ignored` readable ones of which a
    text was ignored, by kind.

    `token_rows` are the token ids of the captions, where a tokenizer has added them.
    """

    samples: Sequence[Sample]
    modality: Modality
    lane: int
    index: int
    cursor: LaneCursor | None
    bad: Mapping[str, int]
    token_rows: Sequence[Sequence[int]] | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For messages."""
        names = [sample.name for sample in self.samples]
        which = f", {names[0]} to {names[-1]}" if names else ""  # bad samples at the end of a sweep come without others
        return f"the pack of lane {self.lane}, step {self.index} ({len(names)} samples{which})"


class Lane:
    """One lane: a stream of packs for each modality, of which each step takes the schedule's."""

    def __init__(self, rules: Mapping[Modality, StreamConfig], cursor: LaneCursor) -> None:
        self._rules = rules
        self._cursor = cursor
        self._streams: dict[Modality, Stream] = {}

    def begin(self, modality: Modality) -> None:
        """Fetch what waits in this modality and announce what is read first; does nothing when called again.

        Raises: DataError if that cannot be read.
        """
        if modality not in self._streams:
            start = self._cursor.streams.get(modality, StreamCursor())
            self._streams[modality] = Stream(self._rules[modality], self._cursor.lane, start)

    def next_plan(self, modality: Modality, index: int) -> Plan:
        """The next pack of this modality; `index` is its number in the lane.

        Raises: DataError if a shard cannot be read, nothing readable is left or the policy for bad samples says so.
        """
        self.begin(modality)
        stream = self._streams[modality]
        samples, bad = stream.next_pack()
        ignored = stream.take_ignored()
        streams = {**self._cursor.streams, modality: stream.cursor()}
        self._cursor = replace(self._cursor, packs=self._cursor.packs + 1, streams=streams)
        return Plan(samples, modality, self._cursor.lane, index, self._cursor, bad, ignored=ignored)


class Stream:
    """One modality of one lane: reads its groups of shards in turn into a pool and chooses packs from it.

    The pool is what shuffles: the oldest sample leaves with every pack (where a source has too few samples for its
    weight, once it has waited `LONG_WAIT` packs), the others in an order drawn anew for each
    pack. It never holds more than two epochs of a group, and a pack never holds a sample twice; so where a lane has
    fewer samples an epoch than fit a pack, packs are smaller than the budget.

    When the rules change with the stage, every group goes on where it was last read and what waits in the pool still
    leaves. A group that was never read begins with an epoch of which nothing has been drawn.
    """

    def __init__(self, rules: StreamConfig, lane: int, start: StreamCursor) -> None:
        self._rules = rules
        self._lane = lane
        self._packs = start.packs
        self._empty = start.empty
        groups = [group for group in rules.groups if group.name not in start.empty]
        if not groups:
            raise _nothing_readable(rules, rules.groups[0] if rules.groups else ShardGroup(EVERYTHING, 1, ()), {})
        fresh = ReadPosition(len(start.places) * EPOCH_STRIDE)
        self._places = dict(start.places)
        self._readers = {
            group.name: Reader(rules, group, lane, start.places.get(group.name, fresh)) for group in groups
        }
        self._turns = self._turns_of({name: place.credit for name, place in start.places.items()})
        self._health = BadSampleMonitor(rules.policy, f"lane {lane}, {rules.modality}", start.reading)
        self._seen_this_epoch: set[str] = set()
        self._bad: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        for reader in self._readers.values():
            reader.announce()
        self._pool = list(self._restore(start.pool))

    def next_pack(self) -> tuple[list[Sample], dict[str, int]]:
        """Samples of the next pack and the bad ones met on the way."""
        starved = self._fill()
        candidates = self._candidates(starved)
        tokens = [self._pool[index].tokens for index in candidates]
        chosen = packing.choose(
            tokens,
            [packing.item_cost(count, self._rules.cost) for count in tokens],
            self._rules.token_budget,
            self._rules.cost_budget,
        )
        leaving = [candidates[number] for number in chosen]
        if starved is not None:
            self._warn_starved(starved, sum(tokens[number] for number in chosen))
        samples = [self._pool[index] for index in leaving]
        for index in sorted(leaving, reverse=True):
            del self._pool[index]
        self._packs += 1
        bad, self._bad = dict(self._bad), Counter()
        return samples, bad

    def take_ignored(self) -> dict[str, int]:
        """Readable samples of which a text was ignored, by kind, since this was asked before."""
        ignored, self._ignored = dict(self._ignored), Counter()
        return ignored

    def cursor(self) -> StreamCursor:
        """Where the stream stands after the last pack."""
        read = {name: reader.place._replace(credit=self._turns.credits[name]) for name, reader in self._readers.items()}
        pool = tuple([sample.address for sample in self._pool])
        return StreamCursor(self._packs, {**self._places, **read}, pool, tuple(self._health.to_json()), self._empty)

    def _turns_of(self, credits: Mapping[str, int]) -> WeightedRoundRobin:
        return WeightedRoundRobin({name: reader.group.share for name, reader in self._readers.items()}, credits)

    def _fill(self) -> str | None:
        """Top the pool up; what is read here is fixed by the pool and the places alone.

        Returns: the group whose turn it is and that has no more samples to give, if that ended it.
        """
        rules = self._rules
        tokens = sum([sample.tokens for sample in self._pool])
        oldest: dict[str, int] = {}
        for sample in self._pool:
            if len(oldest) == len(self._readers):
                break
            name, epoch = rules.group_of.get(sample.address.shard), sample.address.epoch
            # Samples of a stage with other groups say nothing of how far this one has come.
            if name in self._readers and epoch // EPOCH_STRIDE == self._readers[name].place.epoch // EPOCH_STRIDE:
                oldest.setdefault(name, epoch)
        while len(self._pool) < rules.pool_samples or tokens < POOL_BUDGETS * rules.token_budget:
            name = self._turns.next()
            reader = self._readers[name]
            if reader.place.epoch > oldest.get(name, reader.place.epoch) + 1:
                return name
            sample = self._read(reader)
            if sample is not None:
                self._pool.append(sample)
                self._turns.taken()
                tokens += sample.tokens
                oldest.setdefault(name, sample.address.epoch)
        return None

    def _warn_starved(self, group: str, tokens: int) -> None:
        """A pack holds a sample once and weights hold, so a few samples cannot fill it nor let others do so."""
        share = tokens / self._rules.token_budget
        if share >= WELL_FILLED or self._rules.cost_budget is not None:
            return
        if not self._rules.warns_first(f"starved: {group}"):
            return
        why = f"source {group} has too few samples in a lane for its weight; lower its weight, data.lanes"
        if len(self._readers) == 1:
            why = "a lane has too few of them and a pack holds each once; lower data.lanes"
        _log.warning(
            "a pack of %s samples is filled to %.0f %% only (lane %d, others may be no fuller), because %s or "
            "token_budget",
            self._rules.modality,
            100 * share,
            self._lane,
            why,
        )

    def _read(self, reader: Reader) -> Sample | None:
        """The next sample of a group; None where there is none, after counting what was bad."""
        found = reader.next()
        if found is None:
            self._close_epoch(reader.group)
            return None
        if isinstance(found, BadSample):
            self._bad[found.kind] += found.samples
            self._health.bad(found.where, SampleError(found.kind, found.message), found.samples)
            return None
        self._health.good()
        if found.ignored:
            self._ignored.update(one.kind for one in found.ignored)
            self._health.ignored(f"{found.name} at byte {found.address.offset}", found.ignored)
        self._seen_this_epoch.add(reader.group.name)
        return self._drawn(found, found.address._replace(since=self._packs))

    def _candidates(self, starved: str | None) -> list[int]:
        """The pool in the order in which it should leave: the oldest, then the rest as drawn for this pack.

        Where a group is `starved`, before that the oldest of the group, which keeps it from reading on.
        Who has waited long draws better, so that sizes that fit badly do not pile up until they make a poor pack.
        """
        # Multiplying by an odd number draws anew from one number a sample, for a tenth of a hash's time.
        factor = draw(self._rules.seed, "pool", self._rules.modality, self._lane, self._packs) | 1
        soon = 1 + self._packs
        turns = [(one.draw * factor & _64_BITS) / (soon - one.address.since) ** 2 for one in self._pool]
        waiting = self._without_twins()
        heads = [waiting[0]]
        if starved is not None and self._packs - self._pool[waiting[0]].address.since <= LONG_WAIT:
            heads.insert(0, next((index for index in waiting if self._group_at(index) == starved), waiting[0]))
        rest = [index for index in waiting if index not in heads]
        return [*dict.fromkeys(heads), *sorted(rest, key=turns.__getitem__)]

    def _without_twins(self) -> Sequence[int]:
        """Places in the pool, of a sample that waits for two epochs only that of the older."""
        if len({sample.address.epoch for sample in self._pool}) == 1:
            return range(len(self._pool))
        first: dict[tuple[int, int], int] = {}
        for index, sample in enumerate(self._pool):
            first.setdefault((sample.address.shard, sample.address.offset), index)
        return list(first.values())

    def _group_at(self, index: int) -> str | None:
        """The group of a sample in the pool; None if the stage reads it no more."""
        return self._rules.group_of.get(self._pool[index].address.shard)

    def _drawn(self, sample: Sample, address: SampleAddress) -> Sample:
        """The sample with its address and its number in this epoch."""
        sample.address = address
        sample.draw = draw(self._rules.seed, "item", address.shard, address.offset, address.epoch)
        return sample

    def _close_epoch(self, group: ShardGroup) -> None:
        """A lane may go an epoch without a sample where samples are few, but not if there are none at all.

        A source of which it was not known that it lacks the modality drops out here.
        """
        if group.name in self._seen_this_epoch:
            self._seen_this_epoch.discard(group.name)
            return
        held = self._holds(group)
        if held == "readable":
            return
        if held == "unreadable" or len(self._readers) == 1:
            raise _nothing_readable(self._rules, group, self._bad)
        if self._rules.warns_first(f"nothing: {group.name}"):
            _log.info("source %s holds no %s sample", group.name, self._rules.modality)
        self._places[group.name] = self._readers.pop(group.name).place
        self._empty = tuple(sorted({*self._empty, group.name}))
        self._turns = self._turns_of(self._turns.credits)

    def _holds(self, group: ShardGroup) -> Held:
        """What a group holds, found once for all lanes: to know that it is nothing, all of its shards are scanned."""
        known = self._rules.held
        if group.name not in known:
            known[group.name] = held_by(self._rules, group)
        return known[group.name]

    def _restore(self, rows: Sequence[SampleAddress]) -> Iterator[Sample]:
        """The saved pool; what the rules of this stage do not allow is counted, but no sign of bad data."""
        rules = self._rules
        for row in rows:
            if row.shard >= len(rules.shards):
                raise _changed(f"number {row.shard}", row)
        for row, found in zip(rows, read_again(rules, rows), strict=True):
            shard = rules.shards[row.shard]
            if found is None:
                raise _changed(shard.name, row)
            if not isinstance(found, SampleError):
                yield self._drawn(found, row)
                continue
            self._bad[found.kind] += 1
            if rules.warns_first(f"left out: {found.kind}"):
                where = f"{shard.name}, number {row.ordinal} at byte {row.offset}"
                _log.warning("samples left out by this stage (%s), the first: %s: %s", found.kind, where, found)


def _changed(shard: str, row: SampleAddress) -> DataError:
    return DataError(
        f"shard {shard}: the sample that the data cursor has at byte {row.offset} is not there any more; "
        "restore the shards this run was started with, or start a new run"
    )


def _nothing_readable(rules: StreamConfig, group: ShardGroup, bad: Mapping[str, int]) -> DataError:
    source = f" of source {group.name}" if group.name else ""
    cause = f" (left out: {', '.join(f'{n} {kind}' for kind, n in sorted(bad.items()))})" if bad else ""
    first = rules.shards[group.shards[0]] if group.shards else None
    apart = None if first is None else scattered(first, rules.modality)
    if first is not None and apart is not None:
        cause += f"; in shard {first.name} the members of {apart} lie apart, but {SORT_HINT}"
    return DataError(
        f"none of the {len(group.shards)} shards{source} has a readable {rules.modality} sample{cause}; "
        "univitar-ds data verify SOURCE lists what is wrong with each"
    )
