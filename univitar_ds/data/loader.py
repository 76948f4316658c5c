"""From sources to packs: the training loader of a rank and the single sweep of an evaluation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from univitar_ds.config.schema import DataConfig, SourceConfig, StageConfig
from univitar_ds.data import text
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.cursor import LaneCursor, Waiting, parse
from univitar_ds.data.delivery import FailureCount, collate, decoded
from univitar_ds.data.lanes import Item, Lane, Plan, StreamRules, check_bad_in_a_row, report_bad, shard_samples
from univitar_ds.data.layout import Modality
from univitar_ds.data.listing import Shard
from univitar_ds.data.samples import SizeRule, read_sample
from univitar_ds.data.sampling import Sampling
from univitar_ds.data.sources import find_shards, fingerprint, of_modality, stage_modalities, validate_sources
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Resolution, token_count


class PackLoader:
    """An endless iterator over steps: for each, the packs of this rank's lanes in ascending order of lane.

    A context manager. Iteration raises DataError when the data cannot go on (a damaged shard, too many unreadable
    samples in a row, a dead decoding process) and never waits for something that will not come. What it gives
    depends on seed, sources, lanes and stage; the split of lanes over ranks and `data.workers` change nothing.
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
        cursors: Mapping[int, Mapping[str, Any]] | None = None,
        first_step: int = 0,
    ) -> None:
        """Look the sources up and start planning and decoding ahead.

        Args: the lanes this rank owns, of `lanes` in all; the modality of every step; tokenizer.json (None: batches
        carry no token ids); coefficients of an item's cost in FLOPs, (a, b) of a*tokens + b*tokens**2; the cursor
        of each owned lane, from `PackedBatch.cursor` (None: start at the beginning); the first step's number.
        Raises: DataError, also for cursors of other data; ConfigError for a tokenizer that does not load.
        """
        shards = validate_sources(sources, [stage])
        rules = stream_rules(shards, data=data, stage=stage, lanes=lanes, seed=seed, cost=cost)
        starts = _start_cursors(cursors, lanes_of_rank, lanes, seed, fingerprint(shards))
        self._owned = [Lane(rules, starts[lane]) for lane in sorted(lanes_of_rank)]
        self._tokenizer = None if tokenizer is None else text.load_tokenizer(tokenizer)
        self._context_length = context_length
        self._failures = FailureCount(data.max_bad_in_a_row)
        sizes = {modality: rule.size for modality, rule in rules.items()}
        self._packs = decoded(self._plans(modality_of, first_step), data, sizes, stage.token_budget)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[PackedBatch]:
        step = []
        for _ in self._owned:
            pack = next(self._packs)
            self._failures.check(pack)
            step.append(collate(pack, self._tokenizer, self._context_length))
        return step

    def close(self) -> None:
        """End the decoding processes. Safe to call again."""
        self._packs.close()

    def _plans(self, modality_of: Callable[[int], Modality], first_step: int) -> Iterator[Plan]:
        for step in itertools.count(first_step):
            modality = modality_of(step)
            for lane in self._owned:
                yield lane.next_plan(modality, step)


def eval_packs(
    sources: Sequence[SourceConfig],
    *,
    modality: Modality,
    resolution: Resolution,
    clip_frames: int,
    token_budget: int,
    tokenizer: str | Path | None,
    context_length: int,
    data: DataConfig,
) -> Iterator[PackedBatch]:
    """Every readable sample of the sources once, in the order of the shards, with its first caption.

    Packs are filled in order up to `token_budget`; a larger item travels alone. Of `data` the limits, `workers` and
    `prefetch_packs` count. Nothing if the sources hold no sample of the modality. `lane` is 0, `cursor` empty.
    Raises: DataError as `PackLoader` does.
    """
    shards = find_shards(sources)
    frames = clip_frames if modality == "video" else 1
    largest = resolution.max_tokens
    if resolution.fixed_px is not None:
        largest = token_count(resolution.grid(1, 1, frames))
    size = SizeRule(modality, resolution, frames, max(token_budget, largest), data.max_image_px)
    loaded = None if tokenizer is None else text.load_tokenizer(tokenizer)
    plans = _sweep(shards, size, token_budget, data.max_bad_in_a_row)
    failures = FailureCount(data.max_bad_in_a_row)
    packs = decoded(plans, data, {modality: size}, size.most_tokens)
    try:
        for pack in packs:
            failures.check(pack)
            yield collate(pack, loaded, context_length)
    finally:
        packs.close()


def stream_rules(
    shards: Sequence[Shard],
    *,
    data: DataConfig,
    stage: StageConfig,
    lanes: int,
    seed: int,
    cost: tuple[float, float] = (0.0, 0.0),
) -> dict[Modality, StreamRules]:
    """The rules of each modality that a stage reads."""
    tflops = stage.cost_budget_tflops
    return {
        modality: StreamRules(
            shards=shards,
            lanes=lanes,
            seed=seed,
            size=SizeRule(
                modality,
                stage.resolution(modality),
                stage.clip_frames if modality == "video" else 1,
                stage.token_budget,
                data.max_image_px,
                Sampling(**stage.clip_sampling.model_dump()),
            ),
            token_budget=stage.token_budget,
            pool_samples=data.pool_samples,
            max_bad_in_a_row=data.max_bad_in_a_row,
            cost=cost,
            cost_budget=None if tflops is None else tflops * 1e12,
        )
        for modality in stage_modalities(stage)
    }


def _start_cursors(
    cursors: Mapping[int, Mapping[str, Any]] | None, owned: Sequence[int], lanes: int, seed: int, identity: str
) -> dict[int, LaneCursor]:
    if cursors is None:
        return {lane: LaneCursor(lane, lanes, seed, identity) for lane in owned}
    missing = sorted(set(owned) - set(cursors))
    if missing:
        raise DataError(f"no saved data cursor for lane {missing[0]} of {lanes}; resume from a whole checkpoint")
    return {
        lane: parse(cursors[lane]).expect(lane=lane, lanes=lanes, seed=seed, fingerprint=identity) for lane in owned
    }


def _sweep(shards: Sequence[Shard], size: SizeRule, token_budget: int, max_bad_in_a_row: int) -> Iterator[Plan]:
    """Packs of consecutive samples; bad samples at the end come with a last, empty pack."""
    numbers = itertools.count()
    items: list[Item] = []
    tokens = in_a_row = 0
    bad: Counter[str] = Counter()

    def plan() -> Plan:
        return Plan(tuple(items), size.modality, 0, next(numbers), None, dict(bad))

    for index in of_modality(shards, size.modality):
        shard = shards[index]
        for ordinal, group in enumerate(shard_samples(shard, size.modality)):
            try:
                sample = read_sample(shard, group, size)
            except SampleError as error:
                bad[error.kind] += 1
                in_a_row += 1
                report_bad(f"{shard.name}/{group.key}", group.offset, error)
                check_bad_in_a_row(in_a_row, max_bad_in_a_row, f"shard {shard.name}", error)
                continue
            in_a_row = 0
            if items and tokens + sample.tokens > token_budget:
                yield plan()
                items, tokens, bad = [], 0, Counter()
            address = Waiting(index, group.offset, group.length, ordinal, 0, 0)
            items.append(Item(sample, sample.captions[0], address))
            tokens += sample.tokens
    if items or bad:
        yield plan()
