"""From sources to packs: the training loader of a rank and the single sweep of an evaluation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from univitar_ds import tokenization
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.collate import DecodingHealth, collate, decoded, tokenized
from univitar_ds.data.sampler.bad_samples import BadPolicy, BadSampleMonitor
from univitar_ds.data.sampler.cursor import BufferedSample, LaneCursor
from univitar_ds.data.sampler.lanes import Item, Lane, Plan
from univitar_ds.data.sampler.reader import FILES_OF_A_GROUP, HINTED, announce, read_entry, samples_in, where_is
from univitar_ds.data.sampler.stream_config import bad_policy, stream_config
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.index_cache import IndexCache, shard_samples
from univitar_ds.data.shards.samples import SizeRule
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


class PackLoader:
    """An endless iterator over steps: for each, the packs of this rank's lanes in ascending order of lane.

    A context manager. Iteration raises DataError when the data cannot go on (a shard that cannot be read, more
    unreadable samples than the policy allows, decoding processes that die too often) and never waits for something
    that will not come. What it gives depends on seed, sources, lanes and stage; the split of lanes over ranks and
    `data.workers` change nothing.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        data: DataConfig,
        stage: StageConfig,
        lanes_of_rank: Sequence[int],
        lanes: int,
        seed: int,
        modality_of: Callable[[int], Modality],
        tokenizer: str | Path | None,
        context_length: int,
        cost: tuple[float, float] = (0.0, 0.0),
        cursors: Mapping[int, LaneCursor] | None = None,
        first_step: int = 0,
        prefetch_full_step: bool = False,
        content: str | None = None,
    ) -> None:
        """Look the sources up and start planning and decoding ahead.

        Args: the lanes this rank owns, of `lanes` in all; the modality of every step; tokenizer.json (None: batches
        carry no token ids); coefficients of an item's cost in FLOPs, (a, b) of a*tokens + b*tokens**2; the cursor
        of each owned lane, from `PackedBatch.cursor` (None: start at the beginning); the first step's number;
        whether to decode a whole step ahead, for a trainer that leaves the CPU free meanwhile; `content_of` the
        sources' shards where it is known, else it is looked at here.
        Raises: DataError, also for cursors of other data; ConfigError for a tokenizer that does not load.
        """
        shards = validate_sources(sources, [stage], StorageSettings.of(data))
        rules = stream_config(shards, data=data, stage=stage, lanes=lanes, seed=seed, cost=cost)
        self.fingerprint = fingerprint(shards, content)
        belonging = {
            "lanes": lanes,
            "seed": seed,
            "fingerprint": self.fingerprint,
            "accept_changed_sources": data.accept_changed_sources,
        }
        allow_open_files(FILES_OF_A_GROUP * len(lanes_of_rank) * sum(len(rule.groups) for rule in rules.values()))
        starts = {lane: _start_cursor(cursors, lane, belonging) for lane in lanes_of_rank}
        scans = IndexCache()
        self._owned = [Lane(rules, starts[lane], scans) for lane in sorted(lanes_of_rank)]
        self._tokenizer = None if tokenizer is None else tokenization.load_tokenizer(tokenizer)
        self._health = DecodingHealth(bad_policy(data))
        sizes = {modality: rule.size for modality, rule in rules.items()}
        self._packs = decoded(
            tokenized(self._plans(modality_of, first_step), self._tokenizer, context_length),
            data,
            sizes,
            stage.token_budget,
            packs_of_step=len(self._owned),
            prefetch_full_step=prefetch_full_step,
            from_s3=on_s3(shards),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[PackedBatch]:
        step = []
        for _ in self._owned:
            pack = self._health.check(next(self._packs))
            step.append(collate(pack, self._tokenizer))
        return step

    def close(self) -> None:
        """End the decoding processes. Safe to call again."""
        self._packs.close()

    def _plans(self, modality_of: Callable[[int], Modality], first_step: int) -> Iterator[Plan]:
        for step in itertools.count(first_step):
            modality = modality_of(step)
            for lane in self._owned:  # all storages hear of all first shards before a lane waits for its own
                lane.begin(modality)
            for lane in self._owned:
                yield lane.next_plan(modality, step)


def eval_packs(
    sources: Sequence[SourceConfig],
    *,
    modality: Modality,
    resolution: Resolution,
    video_frames: int,
    token_budget: int,
    tokenizer: str | Path | None,
    context_length: int,
    data: DataConfig,
) -> Generator[PackedBatch]:
    """Every readable sample of the sources once, in the order of the shards, with its first caption; the other lines of
    a source whose `captions` are lines come beside it.

    A sample with a label only has the caption "": templates of the sources are for training.
    Packs are filled in order up to `token_budget`; a larger item travels alone. Of `data` the limits, `workers` and
    `prefetch_packs` count. Nothing if the sources hold no sample of the modality. `lane` is 0, `cursor` None.
    Raises: DataError as `PackLoader` does.
    """
    shards = find_shards(sources, StorageSettings.of(data))
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
    loaded = None if tokenizer is None else tokenization.load_tokenizer(tokenizer)
    plans = tokenized(_sweep(shards, size, token_budget, bad_policy(data)), loaded, context_length)
    health = DecodingHealth(bad_policy(data))
    packs = decoded(plans, data, {modality: size}, size.most_tokens, from_s3=on_s3(shards))
    try:
        for pack in packs:
            yield collate(health.check(pack), loaded)
    finally:
        packs.close()


def _start_cursor(
    cursors: Mapping[int, LaneCursor] | None, lane: int, belonging: Mapping[str, Any]
) -> LaneCursor:
    """The lane's saved cursor, or its beginning; `belonging` are the arguments of `LaneCursor.expect`."""
    if cursors is None:
        return LaneCursor(lane, belonging["lanes"], belonging["seed"], belonging["fingerprint"])
    if lane not in cursors:
        raise DataError(f"no saved data cursor for lane {lane} of {belonging['lanes']}; resume from a whole checkpoint")
    return cursors[lane].expect(lane=lane, **belonging)


def _sweep(shards: Sequence[SourceShard], size: SizeRule, token_budget: int, policy: BadPolicy) -> Iterator[Plan]:
    """Packs of consecutive samples; bad samples at the end come with a last, empty pack."""
    numbers = itertools.count()
    health = BadSampleMonitor(policy, f"evaluation, {size.modality}")
    items: list[Item] = []
    tokens = 0
    bad: Counter[str] = Counter()
    ignored: Counter[str] = Counter()

    def plan() -> Plan:
        return Plan(tuple(items), size.modality, 0, next(numbers), None, dict(bad), ignored=dict(ignored))

    indices = of_modality(shards, size.modality)
    for place, index in enumerate(indices, 1):
        announce([shards[other] for other in indices[place : place + HINTED]])
        shard = shards[index]
        number = 0
        for entry in shard_samples(shard, size.modality):
            ordinal, number = number, number + isinstance(entry, tar_index.Group)
            try:
                sample = read_entry(shard, entry, size, label_is_enough=True)
            except SampleError as error:
                samples = samples_in(shard, entry, ordinal)
                bad[error.kind] += samples
                health.bad(where_is(shard, entry), error, samples)
                continue
            health.good()
            if items and tokens + sample.tokens > token_budget:
                yield plan()
                items, tokens, bad, ignored = [], 0, Counter(), Counter()
            if sample.ignored:
                ignored.update(one.kind for one in sample.ignored)
                health.ignored(where_is(shard, entry), sample.ignored)
            address = BufferedSample(index, entry.offset, entry.end - entry.offset, ordinal, 0, 0)
            others = sample.captions[1:] if shard.caption_lines else ()
            items.append(Item(sample, next(iter(sample.captions), ""), address, others=others))
            tokens += sample.tokens
    if items or bad:
        yield plan()
