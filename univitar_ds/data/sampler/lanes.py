"""Lanes: deterministic, endless streams of plans, which are packs before decoding.

The plans of a lane depend on the seed, the sources, the number of lanes and the stage. They do not depend on the number
of ranks or decoding processes or on their timing, so any rank can continue any lane from its cursor.
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
from univitar_ds.data.sampler.shuffle_buffer import ShuffleBuffer
from univitar_ds.data.sampler.stream_config import StreamConfig
from univitar_ds.data.shards.samples import FILTERED, Sample, SampleAddress
from univitar_ds.data.shards.sources import EVERYTHING, ShardGroup
from univitar_ds.data.shards.tar_index import SORT_HINT
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality
from univitar_ds.randomness import draw

_log = logging.getLogger(__name__)

WELL_FILLED = 0.9
"""A warning is logged if a pack has less than this share of the token budget because a group has too few samples."""
LONG_WAIT = 64
"""Maximum number of packs that the oldest sample of the buffer waits behind a starved group; see `Stream`."""
BUFFER_BUDGETS = 2
"""The shuffle buffer is filled to at least this many times `token_budget` tokens, so that packs of small items are
full too."""


@dataclass(frozen=True)
class Plan:
    """A pack before decoding.

    `bad` and `ignored` are counts by kind: samples left out while planning, and readable samples with content that is
    ignored (`captions.IGNORED`). `filtered` counts the samples that conditions left out, by rule.
    `token_rows` are the token ids of the captions, if they were tokenized. `whole_files`: see `DecodeJob`.
    """

    samples: Sequence[Sample]
    modality: Modality
    lane: int
    index: int
    cursor: LaneCursor | None
    bad: Mapping[str, int]
    token_rows: Sequence[Sequence[int]] | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    filtered: Mapping[str, int] = field(default_factory=dict)
    whole_files: bool = False

    @property
    def name(self) -> str:
        """A name for messages."""
        samples = self.samples
        # The last plan of an evaluation may have no samples.
        which = f", {samples[0].name} to {samples[-1].name}" if samples else ""
        return f"the pack of lane {self.lane}, step {self.index} ({len(samples)} samples{which})"


class Lane:
    """A lane, with a stream per modality. Each step takes the next plan from the stream of its modality."""

    def __init__(self, configs: Mapping[Modality, StreamConfig], cursor: LaneCursor) -> None:
        self._configs = configs
        self._cursor = cursor
        self._streams: dict[Modality, Stream] = {}

    def begin(self, modality: Modality) -> None:
        """Creates the stream of a modality, reads its saved shuffle buffer and prefetches its first shards.

        Does nothing when called again.
        Raises: DataError if the samples cannot be read.
        """
        if modality not in self._streams:
            start = self._cursor.streams.get(modality, StreamCursor())
            self._streams[modality] = Stream(self._configs[modality], self._cursor.lane, start)

    def next_plan(self, modality: Modality, index: int) -> Plan:
        """Returns the next plan of this modality. `index`: number of the plan in the lane.

        Raises: DataError if a shard cannot be read, if there is no readable sample, or if the policy for bad samples
        ends the run.
        """
        self.begin(modality)
        stream = self._streams[modality]
        samples, bad = stream.next_pack()
        ignored, filtered = stream.take_ignored(), stream.take_filtered()
        streams = {**self._cursor.streams, modality: stream.cursor()}
        self._cursor = replace(self._cursor, packs=self._cursor.packs + 1, streams=streams)
        return Plan(samples, modality, self._cursor.lane, index, self._cursor, bad, ignored=ignored, filtered=filtered)


class Stream:
    """One modality of one lane: reads samples of its groups into a shuffle buffer and chooses packs from the buffer.

    Every pack contains the oldest sample of the buffer. If a group is starved (it has too few samples for its weight),
    its oldest sample takes this place until the oldest sample of the buffer has waited more than `LONG_WAIT` packs. The
    order of the other samples is drawn for each pack. The buffer has samples of at most two epochs of a group, and a
    pack never contains a sample twice. So packs are smaller than the budget if an epoch of a lane has fewer samples
    than fit into a pack.

    In a new stage, every group continues at its last position, and samples in the buffer are still used. A new group
    begins with an epoch number that no group of an earlier stage uses.
    """

    def __init__(self, config: StreamConfig, lane: int, start: StreamCursor) -> None:
        self._config = config
        self._lane = lane
        self._packs = start.packs
        self._empty = start.empty
        groups = [group for group in config.groups if group.name not in start.empty]
        if not groups:
            raise _nothing_readable(config, config.groups[0] if config.groups else ShardGroup(EVERYTHING, 1, ()), {})
        fresh = ReadPosition(len(start.places) * EPOCH_STRIDE)
        self._places = dict(start.places)
        self._readers = {
            group.name: Reader(config, group, lane, start.places.get(group.name, fresh)) for group in groups
        }
        self._round_robin = self._round_robin_of({name: place.credit for name, place in start.places.items()})
        self._monitor = BadSampleMonitor(config.policy, f"lane {lane}, {config.modality}", start.reading)
        self._seen_this_epoch: set[str] = set()
        self._bad: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._filtered: Counter[str] = Counter()
        for reader in self._readers.values():
            reader.announce()
        self._buffer = ShuffleBuffer(self._restore(start.pool))

    def waiting_tokens(self) -> list[int]:
        """Fills the shuffle buffer. Returns the number of tokens of each of its samples."""
        self._fill()
        return list(self._buffer.tokens)

    def next_pack(self) -> tuple[list[Sample], dict[str, int]]:
        """Returns the samples of the next pack, and bad samples since the previous pack, by kind."""
        starved = self._fill()
        candidates = self._candidates(starved)
        all_tokens = self._buffer.tokens
        tokens = [all_tokens[index] for index in candidates]
        limit = self._config.cost_budget  # without it, `choose` does not use the costs
        costs = tokens if limit is None else [packing.item_cost(count, self._config.cost) for count in tokens]
        chosen = packing.choose(tokens, costs, self._config.token_budget, limit)
        if starved is not None:
            self._warn_starved(starved, sum(tokens[number] for number in chosen))
        samples = self._buffer.take([candidates[number] for number in chosen])
        self._packs += 1
        bad, self._bad = dict(self._bad), Counter()
        return samples, bad

    def take_ignored(self) -> dict[str, int]:
        """Returns the number of readable samples with ignored content, by kind, and resets it."""
        ignored, self._ignored = dict(self._ignored), Counter()
        return ignored

    def take_filtered(self) -> dict[str, int]:
        """Returns the number of samples that conditions left out, by rule, and resets it."""
        filtered, self._filtered = dict(self._filtered), Counter()
        return filtered

    def cursor(self) -> StreamCursor:
        """Returns the position of the stream after the last pack."""
        credits = self._round_robin.credits
        read = {name: reader.place._replace(credit=credits[name]) for name, reader in self._readers.items()}
        pool = tuple(self._buffer.addresses)
        return StreamCursor(self._packs, {**self._places, **read}, pool, tuple(self._monitor.to_json()), self._empty)

    def _round_robin_of(self, credits: Mapping[str, int]) -> WeightedRoundRobin:
        return WeightedRoundRobin({name: reader.group.share for name, reader in self._readers.items()}, credits)

    def _fill(self) -> str | None:
        """Fills the shuffle buffer. Which samples it reads depends only on the buffer and the positions of the groups.

        Returns: the starved group, if filling ended because the next group already has two epochs in the buffer.
        """
        config = self._config
        budget = BUFFER_BUDGETS * config.token_budget
        oldest: dict[str, int] = {}
        for sample in self._buffer:
            if len(oldest) == len(self._readers):
                break
            name, epoch = config.group_of.get(sample.address.shard), sample.address.epoch
            # A sample that an earlier stage read in another group has that group's epoch, which is not comparable.
            if name in self._readers and epoch // EPOCH_STRIDE == self._readers[name].place.epoch // EPOCH_STRIDE:
                oldest.setdefault(name, epoch)
        while len(self._buffer) < config.pool_samples or self._buffer.total_tokens < budget:
            name = self._round_robin.next()
            reader = self._readers[name]
            if reader.place.epoch > oldest.get(name, reader.place.epoch) + 1:
                return name
            sample = self._read(reader)
            if sample is not None:
                self._buffer.append(sample)
                self._round_robin.taken(name)
                oldest.setdefault(name, sample.address.epoch)
        return None

    def _warn_starved(self, group: str, tokens: int) -> None:
        """Warns of a pack that is not full because a group has too few samples."""
        share = tokens / self._config.token_budget
        if share >= WELL_FILLED or (self._config.cost_budget is not None and not self._config.balance_time):
            return
        if not self._config.is_first_warning(f"starved: {group}"):
            return
        why = f"source {group} has too few samples in a lane for its weight; lower its weight, data.lanes"
        if len(self._readers) == 1:
            few = "a lane has too few samples for its shuffle buffer, and a pack contains each sample at most once"
            why = f"{few}; lower data.pool_samples, data.lanes"
        _log.warning(
            "a pack of %s samples is only %.0f %% full (lane %d; reported only once), because %s or token_budget",
            self._config.modality,
            100 * share,
            self._lane,
            why,
        )

    def _read(self, reader: Reader) -> Sample | None:
        """Returns the next sample of a group; None for a bad sample, which is counted, or at the end of an epoch."""
        found = reader.next()
        if found is None:
            self._close_epoch(reader.group)
            return None
        if isinstance(found, BadSample) and found.kind == FILTERED:
            self._count_filtered(found.where, found.message)
            return None
        if isinstance(found, BadSample):
            self._bad[found.kind] += found.samples
            self._monitor.bad(found.where, SampleError(found.kind, found.message), found.samples)
            return None
        self._monitor.good()
        if found.ignored:
            self._ignored.update(one.kind for one in found.ignored)
            self._monitor.ignored(f"{found.name} at byte {found.address.offset}", found.ignored)
        self._seen_this_epoch.add(reader.group.name)
        return self._drawn(found, SampleAddress(*found.address[:-1], self._packs))

    def _count_filtered(self, where: str, rule: str) -> None:
        self._filtered[rule] += 1
        if self._config.is_first_warning(f"filtered: {rule}"):
            _log.info("samples are left out %s; the first is %s", rule, where)

    def _candidates(self, starved: str | None) -> list[int]:
        """Returns indices of the shuffle buffer in order of preference: the oldest sample, then a random order.

        If a group is `starved`, its oldest sample is first, because no new sample of the group is read while that
        sample is in the buffer. After more than `LONG_WAIT` packs, the oldest sample of the buffer is first again.
        Samples that have waited longer tend to be earlier, so that sizes that fit badly do not accumulate.
        """
        order = self._buffer.shuffled(
            draw(self._config.seed, "pool", self._config.modality, self._lane, self._packs) | 1, self._packs
        )
        waiting = self._buffer.without_repeats()
        heads = [waiting[0]]
        if starved is not None and self._packs - self._buffer[waiting[0]].address.since <= LONG_WAIT:
            heads.insert(0, next((index for index in waiting if self._group_at(index) == starved), waiting[0]))
        if len(waiting) < len(order):
            kept = set(waiting)
            order = [index for index in order if index in kept]
        return list(dict.fromkeys([*heads, *order]))

    def _group_at(self, index: int) -> str | None:
        """Returns the group of a sample in the shuffle buffer; None if the stage does not read it."""
        return self._config.group_of.get(self._buffer[index].address.shard)

    def _drawn(self, sample: Sample, address: SampleAddress) -> Sample:
        """Sets the sample's address, its random number for this epoch, its augmentation, and the grid of its crop."""
        config = self._config
        sample.address = address
        sample.draw = draw(config.seed, "item", address.shard, address.offset, address.epoch)
        if config.augment is not None:
            sample.augmentation = config.augment.drawn(sample.draw, sample.size.height, sample.size.width)
            if (crop := sample.augmentation.crop) is not None:
                sample.grid = config.size.grid(crop.height, crop.width, sample.frames)
                sample.downscaled = config.size.shrinks(crop.height, crop.width, sample.grid)
        return sample

    def _close_epoch(self, group: ShardGroup) -> None:
        """Handles the end of a group's epoch. If the group has few samples, a lane may have none of them in an epoch.

        Removes the group if it turns out to have no sample of the modality.
        Raises: DataError if all samples of the group are unreadable, or if it has none and is the only group.
        """
        if group.name in self._seen_this_epoch:
            self._seen_this_epoch.discard(group.name)
            return
        held = self._holds(group)
        if held == "readable":
            return
        if held == "unreadable" or len(self._readers) == 1:
            raise _nothing_readable(self._config, group, {**self._bad, **self._filtered})
        if self._config.is_first_warning(f"nothing: {group.name}"):
            _log.info("source %s holds no %s sample", group.name, self._config.modality)
        self._places[group.name] = self._readers.pop(group.name).place
        self._empty = tuple(sorted({*self._empty, group.name}))
        self._round_robin = self._round_robin_of(self._round_robin.credits)

    def _holds(self, group: ShardGroup) -> Held:
        """Returns `held_by` of the group, cached for all lanes, because it may scan all shards of the group."""
        known = self._config.held
        if group.name not in known:
            known[group.name] = held_by(self._config, group)
        return known[group.name]

    def _restore(self, rows: Sequence[SampleAddress]) -> Iterator[Sample]:
        """Yields the samples of the saved shuffle buffer.

        Samples that this stage does not allow are counted, but not by the policy for bad samples.
        """
        config = self._config
        for row in rows:
            if row.shard >= len(config.shards):
                raise _changed(f"number {row.shard}", row)
        for row, found in zip(rows, read_again(config, rows), strict=True):
            shard = config.shards[row.shard]
            if found is None:
                raise _changed(shard.name, row)
            if not isinstance(found, SampleError):
                yield self._drawn(found, row)
                continue
            if found.kind == FILTERED:
                self._count_filtered(f"{shard.name} at byte {row.offset}", str(found))
                continue
            self._bad[found.kind] += 1
            if config.is_first_warning(f"left out: {found.kind}"):
                where = f"sample {row.ordinal} of shard {shard.name} (byte {row.offset})"
                _log.warning("this stage leaves out samples (%s); the first is %s: %s", found.kind, where, found)


def _changed(shard: str, row: SampleAddress) -> DataError:
    return DataError(
        f"shard {shard}: the data cursor refers to a sample at byte {row.offset}, which no longer exists; "
        "restore the shards this run was started with, or start a new run"
    )


def _nothing_readable(config: StreamConfig, group: ShardGroup, bad: Mapping[str, int]) -> DataError:
    source = f" of source {group.name}" if group.name else ""
    cause = f" (left out: {', '.join(f'{n} {kind}' for kind, n in sorted(bad.items()))})" if bad else ""
    first = config.shards[group.shards[0]] if group.shards else None
    apart = None if first is None else scattered(first, config.modality)
    if first is not None and apart is not None:
        cause += f"; in shard {first.name} the members of {apart} are not consecutive, but {SORT_HINT}"
    return DataError(
        f"none of the {len(group.shards)} shards{source} has a readable {config.modality} sample{cause}; "
        "univitar-ds data verify SOURCE lists what is wrong with each"
    )
