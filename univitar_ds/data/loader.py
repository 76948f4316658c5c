"""Loads packs from sources: the training loader of a rank, and one pass over the data for an evaluation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from univitar_ds import tokenization
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.collate import DecodingMonitor, collate, decoded, tokenized
from univitar_ds.data.decoding.shared_slots import PageLock
from univitar_ds.data.media.prober import Prober, probe_each
from univitar_ds.data.sampler.bad_samples import BadPolicy, BadSampleMonitor
from univitar_ds.data.sampler.balance import SAMPLED_LANES, balanced
from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.data.sampler.lanes import Lane, Plan
from univitar_ds.data.sampler.reader import (
    FILES_OF_A_GROUP,
    HINTED,
    announce,
    numbered,
    read_entries,
    samples_in,
    where_is,
)
from univitar_ds.data.sampler.stream_config import StreamConfig, bad_policy, stream_config
from univitar_ds.data.shards.index_cache import shard_samples
from univitar_ds.data.shards.samples import FILTERED, Sample, SizeRule
from univitar_ds.data.shards.sources import (
    SourceShard,
    find_shards,
    fingerprint,
    of_modality,
    on_s3,
    validate_sources,
)
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.local import allow_open_files
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality, Resolution, token_count

WHOLE_SHARDS = 8
"""Shards per rank from which on the ranks of an evaluation share whole shards: one of them has at most an eighth more
than another."""


@dataclass(frozen=True)
class LaneSet:
    """The lanes that a rank owns, the number of lanes of the run (`count`), and the start positions.

    `cursors` maps each owned lane to its saved `PackedBatch.cursor`; None: lanes start at the beginning. `first_step`
    is the number of the first step. `shards` is the result of `validate_sources` and `content` that of `content_of` for
    these shards, if they are known. `warns`: whether this rank logs warnings about its lanes; of several ranks that own
    the same lanes, one does.
    """

    owned: Sequence[int]
    count: int
    seed: int
    cursors: Mapping[int, LaneCursor] | None = None
    first_step: int = 0
    content: str | None = None
    shards: Sequence[SourceShard] | None = None
    warns: bool = True

    def starts(self, fingerprint: str, accept_changed_sources: bool) -> list[LaneCursor]:
        """Returns the start of each owned lane, in ascending order of lane.

        Raises: DataError if a cursor is missing or belongs to other data.
        """
        starts = []
        for lane in sorted(self.owned):
            if self.cursors is None:
                starts.append(LaneCursor(lane, self.count, self.seed, fingerprint))
                continue
            if lane not in self.cursors:
                raise DataError(f"no saved data cursor for lane {lane} of {self.count}; resume from another checkpoint")
            cursor = self.cursors[lane].expect(
                lane=lane,
                lanes=self.count,
                seed=self.seed,
                fingerprint=fingerprint,
                accept_changed_sources=accept_changed_sources,
                warns=self.warns and lane == 0,  # it holds for all lanes
            )
            starts.append(cursor)
        return starts


@dataclass(frozen=True)
class EvalShare:
    """The share of an evaluation's samples that one of several ranks reads: share `place` of `count`.

    `shards` is the result of `find_shards` for the sources, which one rank lists for all.
    """

    shards: Sequence[SourceShard]
    place: int = 0
    count: int = 1

    def holds_shard(self, number: int, shards: int) -> bool:
        """Whether this rank reads samples of shard `number`, of `shards` shards. Many shards are shared as a whole, so
        that each is read by one rank."""
        return not self._whole_shards(shards) or number % self.count == self.place

    def holds_sample(self, number: int, shards: int) -> bool:
        """Whether sample `number` of a shard that this rank reads belongs to this rank."""
        return self._whole_shards(shards) or number % self.count == self.place

    def _whole_shards(self, shards: int) -> bool:
        return shards >= WHOLE_SHARDS * self.count


class PackLoader:
    """An endless iterator over steps; each step is the packs of this rank's lanes in ascending order of lane.

    Use it as a context manager. Iteration raises DataError if a shard cannot be read, if more samples are unreadable
    than the policy allows, or if decoding processes die too often; it never blocks forever. The packs of a lane depend
    on seed, sources, number of lanes and stage; they do not depend on the assignment of lanes to ranks or on
    `data.workers`.
    """

    def __init__(
        self,
        data: DataConfig,
        stage: StageConfig,
        lanes: LaneSet,
        *,
        modality_of: Callable[[int], Modality],
        tokenizer: str | Path | None,
        context_length: int,
        cost: tuple[float, float] = (0.0, 0.0),
        prefetch_full_step: bool = False,
        page_lock: PageLock | None = None,
    ) -> None:
        """Lists the shards of the sources, unless `lanes` has them, and starts planning and decoding ahead.

        Many arguments because they come from the trainer, the model and the device.

        Args:
            modality_of: modality of a step.
            tokenizer: path of tokenizer.json; None for batches without token ids.
            cost: coefficients (a, b) of an item's FLOPs, a*tokens + b*tokens**2.
            prefetch_full_step: whether to decode a whole step ahead, for a trainer that leaves the CPU cores idle.
            page_lock: locks the memory of the packs for copies to a device; None: it is not locked.
        Raises: DataError if sources are unusable or cursors belong to other data; ConfigError if the tokenizer is
            unusable.
        """
        shards = lanes.shards
        if shards is None:
            shards = validate_sources(data.sources, [stage], StorageSettings.of(data))
        if not lanes.warns:
            shards = [replace(shard, watch=None) for shard in shards]
        about = {"lanes": lanes.count, "seed": lanes.seed, "cost": cost, "warns": lanes.warns}
        configs = stream_config(shards, data=data, stage=stage, **about)
        self.fingerprint = fingerprint(shards, lanes.content)
        self._starts = lanes.starts(self.fingerprint, data.accept_changed_sources)
        self._tokenizer = None if tokenizer is None else tokenization.load_tokenizer(tokenizer)
        self._monitor = DecodingMonitor(bad_policy(data, lanes.warns))

        def plans_of(probe: Prober) -> Iterator[Plan]:
            probing = {modality: replace(config, probe=probe) for modality, config in configs.items()}
            groups = sum(len(config.groups) for config in probing.values())
            allow_open_files(FILES_OF_A_GROUP * (len(self._starts) + SAMPLED_LANES) * groups)
            plans = _plans(probing, self._starts, modality_of, lanes.first_step)
            return tokenized(plans, self._tokenizer, context_length)

        self._packs = decoded(
            plans_of,
            data,
            {modality: config.size for modality, config in configs.items()},
            stage.token_budget,
            packs_of_step=len(self._starts),
            prefetch_full_step=prefetch_full_step,
            from_s3=on_s3(shards),
            page_lock=page_lock,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[PackedBatch]:
        # Collated one after another, not between waits, for the reason of `pipeline.PLANNED_TOGETHER`.
        packs = [next(self._packs) for _ in self._starts]
        return [collate(self._monitor.check(pack), self._tokenizer) for pack in packs]

    def close(self) -> None:
        """Ends the decoding processes. May be called more than once."""
        self._packs.close()


def _plans(
    configs: Mapping[Modality, StreamConfig],
    starts: Sequence[LaneCursor],
    modality_of: Callable[[int], Modality],
    first_step: int,
) -> Iterator[Plan]:
    configs = balanced(configs)  # here, where sizes can be probed in the decoding processes
    lanes = [Lane(configs, start) for start in starts]
    for step in itertools.count(first_step):
        modality = modality_of(step)
        for lane in lanes:  # requests the first shards of all lanes before waiting for a shard
            lane.begin(modality)
        for lane in lanes:
            yield lane.next_plan(modality, step)


def eval_packs(
    sources: Sequence[SourceConfig],
    *,
    modality: Modality,
    resolution: Resolution,
    video_frames: int,
    token_budget: int,
    tokenizer: str | Path | Tokenizer | None,
    context_length: int,
    data: DataConfig,
    share: EvalShare | None = None,
) -> Generator[PackedBatch]:
    """Yields packs of every readable sample of one modality once, in the order of the shards, with its first caption.

    Many arguments because the evaluation, the stage and the model each bring some.

    If a source has one caption per line, the other lines are in `PackedBatch.other_captions`. A sample with only a
    label has the caption "", because templates of sources are used in training only.
    Packs are filled in order up to `token_budget`; a larger item is alone in its pack. Of `data`, only limits,
    storage, `workers` and `prefetch_packs` are used. `lane` is 0 and `cursor` None. If there are no
    samples, it yields nothing.
    Args: share: the samples that this process reads; None: all of them.
    Raises: DataError or ConfigError as `PackLoader` does.
    """
    share = share or EvalShare(find_shards(sources, StorageSettings.of(data)))
    frames = video_frames if modality == "video" else 1
    largest = resolution.max_tokens
    if resolution.fixed_px is not None:
        largest = token_count(resolution.grid(1, 1, frames))
    size = SizeRule(
        modality,
        resolution,
        frames,
        max(token_budget, largest),
        data.max_image_px,
        max_video_s=data.max_video_s,
        max_sample_mb=data.max_sample_mb,
    )
    loaded = tokenization.load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer

    def plans_of(probe: Prober) -> Iterator[Plan]:
        return tokenized(_sweep(share, size, token_budget, bad_policy(data), probe), loaded, context_length)

    monitor = DecodingMonitor(bad_policy(data))
    packs = decoded(plans_of, data, {modality: size}, size.most_tokens, from_s3=on_s3(share.shards))
    try:
        for pack in packs:
            yield collate(monitor.check(pack), loaded)
    finally:
        packs.close()


def _sweep(
    share: EvalShare, size: SizeRule, token_budget: int, policy: BadPolicy, probe: Prober = probe_each
) -> Iterator[Plan]:
    """Yields plans of consecutive samples. Samples left out at the end are reported in a last, empty plan."""
    numbers = itertools.count()
    monitor = BadSampleMonitor(policy, f"evaluation, {size.modality}")
    samples: list[Sample] = []
    tokens = 0
    bad: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    filtered: Counter[str] = Counter()

    def plan() -> Plan:
        counts = {"ignored": dict(ignored), "filtered": dict(filtered)}
        return Plan(tuple(samples), size.modality, 0, next(numbers), None, dict(bad), **counts)

    shards, indices = share.shards, of_modality(share.shards, size.modality)
    count = len(indices)
    indices = [index for number, index in enumerate(indices) if share.holds_shard(number, count)]
    for place, index in enumerate(indices, 1):
        announce([shards[other] for other in indices[place : place + HINTED]])
        shard = shards[index]
        entries = numbered(shard_samples(shard, size.modality))
        own = (each for each in entries if share.holds_sample(each[1], count))
        for entry, ordinal, found in read_entries(shard, own, size, probe, label_is_enough=True):
            if isinstance(found, SampleError) and found.kind == FILTERED:
                filtered[str(found)] += 1
                continue
            if isinstance(found, SampleError):
                cost = samples_in(shard, entry, ordinal)
                bad[found.kind] += cost
                monitor.bad(where_is(shard, entry), found, cost)
                continue
            monitor.good()
            if samples and tokens + found.tokens > token_budget:
                yield plan()
                samples, tokens, bad, ignored, filtered = [], 0, Counter(), Counter(), Counter()
            if found.ignored:
                ignored.update(one.kind for one in found.ignored)
                monitor.ignored(where_is(shard, entry), found.ignored)
            samples.append(found)
            tokens += found.tokens
    if samples or bad or filtered:
        yield plan()
