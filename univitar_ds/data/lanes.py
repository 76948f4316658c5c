"""Lanes: deterministic, endless streams of packs. No pixels, no processes: a lane plans, others decode.

Which samples a lane gives, and in which packs, depends on the seed, the sources, the number of lanes and the
stage's rules. The number of ranks, of decoding processes and their timing have no part in it, so any rank can
take up any lane where its cursor says.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from univitar_ds.data import packing, tar
from univitar_ds.data.cursor import LaneCursor, StreamCursor, Waiting
from univitar_ds.data.layout import Modality
from univitar_ds.data.listing import Shard
from univitar_ds.data.randomness import choice, draw
from univitar_ds.data.samples import Sample, SizeRule, belongs, read_sample, read_sample_again
from univitar_ds.data.sources import of_modality
from univitar_ds.data.units import Unit, units_of_lane
from univitar_ds.errors import DataError, SampleError

_log = logging.getLogger(__name__)

POOL_BUDGETS = 2
"""The pool also holds at least so many token budgets, so that small items fill a pack too."""


@dataclass(frozen=True)
class StreamRules:
    """Everything that decides the packs of one modality, but for the lane. `cost` are packing's coefficients."""

    shards: Sequence[Shard]
    lanes: int
    seed: int
    size: SizeRule
    token_budget: int
    pool_samples: int
    max_bad_in_a_row: int
    cost: tuple[float, float] = (0.0, 0.0)
    cost_budget: float | None = None

    @property
    def modality(self) -> Modality:
        return self.size.modality


@dataclass(frozen=True)
class Item:
    """A sample chosen for a pack: what it is, its caption in this epoch, its address and how long it waited.

    `draw` is a 64-bit number of its own in this epoch, for whatever decoding leaves to chance.
    """

    sample: Sample
    caption: str
    address: Waiting
    draw: int = 0


@dataclass(frozen=True)
class Plan:
    """A pack before decoding. `bad` counts unreadable samples met while planning, by kind."""

    items: Sequence[Item]
    modality: Modality
    lane: int
    index: int
    cursor: LaneCursor | None
    bad: Mapping[str, int]


class _Position(NamedTuple):
    epoch: int
    unit: int
    offset: int
    ordinal: int


class _Found(NamedTuple):
    """A sample by address, before its content is looked at."""

    shard: int
    group: tar.Group
    ordinal: int


class Lane:
    """One lane: a stream of packs for each modality, of which each step takes the schedule's."""

    def __init__(self, rules: Mapping[Modality, StreamRules], cursor: LaneCursor) -> None:
        self._rules = rules
        self._cursor = cursor
        self._streams: dict[Modality, Stream] = {}

    def next_plan(self, modality: Modality, index: int) -> Plan:
        """The next pack of this modality; `index` is its number in the lane.

        Raises: DataError if a shard is damaged, nothing readable is left or too much in a row is unreadable.
        """
        stream = self._streams.get(modality)
        if stream is None:
            start = self._cursor.streams.get(modality, StreamCursor())
            stream = self._streams[modality] = Stream(self._rules[modality], self._cursor.lane, start)
        items, bad = stream.next_pack()
        streams = {**self._cursor.streams, modality: stream.cursor()}
        self._cursor = replace(self._cursor, packs=self._cursor.packs + 1, streams=streams)
        return Plan(items, modality, self._cursor.lane, index, self._cursor, bad)


class Stream:
    """One modality of one lane: reads its units in order into a pool and chooses packs from it.

    The pool is what shuffles: the oldest sample leaves with every pack, the others in an order drawn anew for each
    pack. It never holds more than two epochs, and a pack never holds a sample twice; so where a lane has fewer
    samples an epoch than fit a pack, packs are smaller than the budget.
    """

    def __init__(self, rules: StreamRules, lane: int, start: StreamCursor) -> None:
        self._rules = rules
        self._lane = lane
        self._packs = start.packs
        self._position = _Position(start.epoch, start.unit, start.offset, start.ordinal)
        self._bad_in_a_row = 0
        self._seen_this_epoch = False
        self._bad: Counter[str] = Counter()
        self._entries = self._walk(self._position)
        self._pool = deque(self._restore(start.pool))

    def next_pack(self) -> tuple[list[Item], dict[str, int]]:
        """Items of the next pack and the bad samples met on the way."""
        self._fill()
        candidates = self._candidates()
        samples = [sample for _, sample in candidates]
        chosen = packing.choose(
            [sample.tokens for sample in samples],
            [packing.item_cost(sample.tokens, self._rules.cost) for sample in samples],
            self._rules.token_budget,
            self._rules.cost_budget,
        )
        leaving = [candidates[index] for index in chosen]
        items = [Item(sample, self._caption(row, sample), row, self._draw(row)) for row, sample in leaving]
        taken = {row for row, _ in leaving}
        self._pool = deque((_aged(row), sample) for row, sample in self._pool if row not in taken)
        self._packs += 1
        bad, self._bad = dict(self._bad), Counter()
        return items, bad

    def cursor(self) -> StreamCursor:
        """Where the stream stands after the last pack."""
        pool = tuple(row for row, _ in self._pool)
        return StreamCursor(*self._position, self._packs, pool)

    def _fill(self) -> None:
        """Top the pool up; what is read here is fixed by the pool and the position alone."""
        rules = self._rules
        tokens = sum(sample.tokens for _, sample in self._pool)
        while len(self._pool) < rules.pool_samples or tokens < POOL_BUDGETS * rules.token_budget:
            if self._pool and self._position.epoch > self._pool[0][0].epoch + 1:
                return
            epoch = self._position.epoch
            found, self._position = next(self._entries)
            if found is None:
                self._close_epoch()
                continue
            sample = self._read(found)
            if sample is not None:
                group = found.group
                row = Waiting(found.shard, group.offset, group.length, found.ordinal, epoch, 0)
                self._pool.append((row, sample))
                tokens += sample.tokens

    def _read(self, found: _Found) -> Sample | None:
        """The sample, or None after counting it as bad."""
        shard = self._rules.shards[found.shard]
        try:
            read = read_sample(shard, found.group, self._rules.size)
        except SampleError as error:
            self._bad[error.kind] += 1
            self._bad_in_a_row += 1
            report_bad(f"{shard.name}/{found.group.key}", found.group.offset, error)
            check_bad_in_a_row(self._bad_in_a_row, self._rules.max_bad_in_a_row, f"shard {shard.name}", error)
            return None
        self._bad_in_a_row = 0
        self._seen_this_epoch = True
        return read

    def _candidates(self) -> list[tuple[Waiting, Sample]]:
        """The pool in the order in which it should leave: the oldest, then the rest as drawn for this pack."""
        key = partial(draw, self._rules.seed, "pool", self._rules.modality, self._lane, self._packs)
        oldest, *rest = self._pool
        unique = {(entry[0].shard, entry[0].offset): entry for entry in reversed([oldest, *rest])}
        rest = [entry for entry in unique.values() if entry is not oldest]
        rest.sort(key=lambda entry: key(entry[0].shard, entry[0].offset, entry[0].epoch))
        return [oldest, *rest]

    def _caption(self, row: Waiting, sample: Sample) -> str:
        n = len(sample.captions)
        return sample.captions[choice(n, self._rules.seed, "caption", row.shard, row.offset, row.epoch)]

    def _draw(self, row: Waiting) -> int:
        return draw(self._rules.seed, "item", row.shard, row.offset, row.epoch)

    def _walk(self, start: _Position) -> Iterator[tuple[_Found | None, _Position]]:
        """Every sample of this lane from `start` on, each with the position after it; None closes an epoch."""
        epoch, first_unit, offset, ordinal = start
        rules = self._rules
        indices = of_modality(rules.shards, rules.modality)
        while True:
            units = units_of_lane(indices, rules.lanes, self._lane, rules.seed, rules.modality, epoch)
            for number in range(first_unit, len(units)):
                for found in _samples_of_unit(rules, units[number], offset, ordinal):
                    yield found, _Position(epoch, number, found.group.end, found.ordinal + 1)
                offset, ordinal = 0, 0
            epoch, first_unit, offset, ordinal = epoch + 1, 0, 0, 0
            yield None, _Position(epoch, 0, 0, 0)

    def _close_epoch(self) -> None:
        """A lane may go an epoch without a sample where samples are few, but not if there are none at all."""
        if not self._seen_this_epoch and not any_readable(self._rules):
            shards = len(of_modality(self._rules.shards, self._rules.modality))
            raise DataError(
                f"none of the {shards} shards has a readable {self._rules.modality} sample"
                f"{_told(self._bad)}; see the warnings above, or data inspect"
            )
        self._seen_this_epoch = False

    def _restore(self, rows: Iterable[Waiting]) -> Iterator[tuple[Waiting, Sample]]:
        """The saved pool; what the rules of this stage do not allow is counted as bad."""
        for row in rows:
            if row.shard >= len(self._rules.shards):
                raise _changed(f"number {row.shard}", row)
            shard = self._rules.shards[row.shard]
            try:
                read = read_sample_again(shard, row.offset, row.length, self._rules.size)
            except SampleError as error:
                self._bad[error.kind] += 1
                report_bad(f"{shard.name}, number {row.ordinal}", row.offset, error)
                continue
            if read is None:
                raise _changed(shard.name, row)
            yield row, read


def any_readable(rules: StreamRules) -> bool:
    """Whether any shard has a sample of the modality that can be read; stops at the first."""
    for index in of_modality(rules.shards, rules.modality):
        for found in _samples_of_unit(rules, Unit(index, 0, 1), 0, 0):
            try:
                read_sample(rules.shards[index], found.group, rules.size)
            except SampleError:
                continue
            return True
    return False


def shard_samples(shard: Shard, modality: Modality, offset: int = 0) -> Iterator[tar.Group]:
    """The samples of a shard that belong to a modality, from a byte on, in order.

    Raises: DataError if the shard is missing, cut or damaged.
    """
    with shard.storage.open(shard.path) as stream:
        for group in tar.groups(stream, shard.name, shard.size, offset):
            if belongs(group, shard, modality):
                yield group


def report_bad(name: str, offset: int, error: SampleError) -> None:
    """One line in the log for a sample that is left out; `name` is "{shard}/{key}", `offset` a byte of the shard."""
    _log.warning("sample left out (%s): %s at byte %d: %s", error.kind, name, offset, error)


def check_bad_in_a_row(count: int, limit: int, where: str, last: Exception) -> None:
    """Raises: DataError once more than `limit` samples in a row are unreadable."""
    if count > limit:
        raise DataError(
            f"{where}: {count} samples in a row cannot be used (data.max_bad_in_a_row is {limit}); the last one: "
            f"{last}; repair the data or raise data.max_bad_in_a_row"
        )


def _samples_of_unit(rules: StreamRules, unit: Unit, offset: int, ordinal: int) -> Iterator[_Found]:
    for group in shard_samples(rules.shards[unit.shard], rules.modality, offset):
        if ordinal % unit.parts == unit.part:
            yield _Found(unit.shard, group, ordinal)
        ordinal += 1


def _aged(row: Waiting) -> Waiting:
    return row._replace(waited=row.waited + 1)


def _changed(shard: str, row: Waiting) -> DataError:
    return DataError(
        f"shard {shard}: the sample that the data cursor has at byte {row.offset} is not there any more; "
        "restore the shards this run was started with, or start a new run"
    )


def _told(bad: Mapping[str, int]) -> str:
    return f" (left out: {', '.join(f'{n} {kind}' for kind, n in sorted(bad.items()))})" if bad else ""
