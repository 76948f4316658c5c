"""Measures the packs that a run would train on: fill, sizes, balance, unreadable samples and speed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.contents import faults_of_stages
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.data.sampler.packing import item_cost, predicted_time, scale_for_dropout
from univitar_ds.data.shards.sources import fingerprint, stage_modalities, validate_sources
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError
from univitar_ds.geometry import Modality

_BINS = 10
_BAR = 40


@dataclass
class Stream:
    """The packs of one modality of one stage, in order. `packs` has the number of tokens of each item."""

    stage: StageConfig
    modality: Modality
    packs: list[list[int]] = field(default_factory=list)
    imbalances: list[float] = field(default_factory=list)
    """For each complete step: the FLOPs of its most expensive pack divided by the mean, minus 1."""
    time_imbalances: list[float] = field(default_factory=list)
    """The same for predicted time, with attention weighted by `data.attention_cost`."""
    bad: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    downscaled: int = 0
    longest_wait: int = 0
    samples_per_s: float = 0.0
    shown: PackedBatch | None = None
    """The first pack that is not empty."""

    @property
    def name(self) -> str:
        return f"stage {self.stage.name}, {self.modality}"

    @property
    def tokens(self) -> list[int]:
        """Number of tokens of each item of all packs."""
        return [tokens for pack in self.packs for tokens in pack]

    @property
    def fills(self) -> list[float]:
        """Share of the token budget that each pack uses."""
        return [sum(pack) / self.stage.token_budget for pack in self.packs]

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "modality": self.modality,
            "packs": len(self.packs),
            "token_budget": self.stage.token_budget,
            "fill_pct": _spread([100 * fill for fill in self.fills]),
            "flop_imbalance_pct": _spread([100 * imbalance for imbalance in self.imbalances]),
            "time_imbalance_pct": _spread([100 * imbalance for imbalance in self.time_imbalances]),
            "items_per_pack": _spread([len(pack) for pack in self.packs]),
            "tokens_per_item": _spread(self.tokens),
            "token_histogram": _histogram(self.tokens),
            "downscaled": self.downscaled,
            "bad": dict(self.bad),
            "ignored": dict(self.ignored),
            "filtered": dict(self.filtered),
            "longest_wait_packs": self.longest_wait,
            "samples_per_s": self.samples_per_s,
        }


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`: totals of the sources, and a stream for each stage and modality."""

    run: str
    shards: int
    bytes: int
    fingerprint: str
    workers: int
    streams: list[Stream]

    def to_json(self) -> dict[str, Any]:
        return {
            "shards": self.shards,
            "bytes": self.bytes,
            "fingerprint": self.fingerprint,
            "workers": self.workers,
            "streams": [stream.to_json() for stream in self.streams],
        }


def inspect(config: RunConfig, *, packs: int = 50, cost: tuple[float, float] = (0.0, 0.0)) -> Inspection:
    """Loads and decodes the first `packs` packs of each stage and modality of a run.

    `cost` are the coefficients of the FLOPs of an item (see `packing.item_cost`); without them, cost budgets have no
    effect.
    Raises: DataError for the same sources as training.
    """
    shards = validate_sources(config.data.sources, config.stages, StorageSettings.of(config.data))
    if faults := faults_of_stages(shards, config.stages):
        raise DataError("; ".join(faults))
    return Inspection(
        run=config.name,
        shards=len(shards),
        bytes=sum(shard.size for shard in shards),
        fingerprint=fingerprint(shards),
        workers=config.data.workers,
        streams=[
            _draw(config, stage, modality, packs, cost)
            for stage in config.stages
            for modality in sorted(stage_modalities(stage))
        ],
    )


def render(inspection: Inspection) -> str:
    """Returns the result as text."""
    size = f"{inspection.bytes / 1e6:.1f} MB"
    lines = [f"{inspection.shards} shards, {size}, fingerprint {inspection.fingerprint}"]
    for stream in inspection.streams:
        lines += ["", *_table(stream.to_json())]
        lines.append(f"  {stream.samples_per_s:.0f} samples/s read and decoded by {_processes(inspection.workers)}")
    return "\n".join(lines)


def _draw(config: RunConfig, stage: StageConfig, modality: Modality, packs: int, cost: tuple[float, float]) -> Stream:
    stream, flops = Stream(stage, modality), scale_for_dropout(cost, stage.patch_dropout)
    times = predicted_time(flops, config.data.attention_cost)
    started, first = time.perf_counter(), 0
    with closing(_steps(config, stage, modality, packs, cost)) as steps:
        for number, step in enumerate(steps):
            if number == 1:  # the first step includes starting processes and filling shuffle buffers
                started, first = time.perf_counter(), len(stream.tokens)
            counted = step[: packs - len(stream.packs)]
            for batch in counted:
                _count(stream, batch)
            if len(counted) == len(step) > 1:
                for coefficients, imbalances in ((flops, stream.imbalances), (times, stream.time_imbalances)):
                    imbalances += _imbalance(stream.packs[-len(step) :], coefficients)
    stream.samples_per_s = round((len(stream.tokens) - first) / (time.perf_counter() - started), 1)
    return stream


def _imbalance(packs: Sequence[Sequence[int]], coefficients: tuple[float, float]) -> list[float]:
    """Returns the cost of the most expensive pack divided by the mean, minus 1; [] for packs without a cost."""
    costs = [sum(item_cost(tokens, coefficients) for tokens in pack) for pack in packs]
    return [max(costs) * len(costs) / sum(costs) - 1] if sum(costs) > 0 else []


def _steps(
    config: RunConfig, stage: StageConfig, modality: Modality, packs: int, cost: tuple[float, float]
) -> Iterator[list[PackedBatch]]:
    """Yields steps that contain `packs` packs in total, from at most that many lanes."""
    lanes = min(config.data.lanes, packs)
    with PackLoader(
        config.loaded_data,
        stage,
        LaneSet(range(lanes), config.data.lanes, config.seed),
        modality_of=lambda step: modality,
        tokenizer=None,
        context_length=config.model.text.context_length,
        cost=cost,
    ) as loader:
        for _ in range(-(-packs // lanes)):
            yield next(loader)


def _count(stream: Stream, batch: PackedBatch) -> None:
    stream.packs.append(batch.grid_thw.prod(dim=1).tolist())
    stream.bad.update(batch.bad)
    stream.ignored.update(batch.ignored)
    stream.filtered.update(batch.filtered)
    stream.downscaled += batch.downscaled
    cursor = batch.cursor.streams[batch.modality]
    # A sample that waited was in an earlier cursor.
    stream.longest_wait = max([stream.longest_wait, *(cursor.packs - row.since for row in cursor.pool)])
    if stream.shown is None and len(batch):
        stream.shown = batch


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    return {"mean": round(sum(values) / len(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def _histogram(tokens: Sequence[int]) -> list[dict[str, int]]:
    """Returns at most `_BINS` bins of equal width from the smallest to the largest item; `to` is inclusive."""
    if not tokens:
        return []
    low, high = min(tokens), max(tokens)
    width = -(-(high - low + 1) // _BINS)
    found = Counter((value - low) // width for value in tokens)
    bins = range(-(-(high - low + 1) // width))
    return [
        {"from": low + number * width, "to": low + (number + 1) * width - 1, "items": found[number]} for number in bins
    ]


def _table(stream: Mapping[str, Any]) -> list[str]:
    fill, items, tokens = stream["fill_pct"], stream["items_per_pack"], stream["tokens_per_item"]
    imbalance, time_imbalance = stream["flop_imbalance_pct"], stream["time_imbalance_pct"]
    lines = [
        f"stage {stream['stage']}, {stream['modality']}: {stream['packs']} packs of {stream['token_budget']} tokens",
        f"  fill           mean {fill['mean']:.2f} %, min {fill['min']:.2f} %",
        f"  FLOP imbalance mean {imbalance['mean']:.2f} %, max {imbalance['max']:.2f} % between the packs of a step",
        f"  of time, predicted {time_imbalance['mean']:.2f} %, max {time_imbalance['max']:.2f} %",
        f"  items a pack   mean {items['mean']:.1f}, min {items['min']:.0f}, max {items['max']:.0f}",
        f"  tokens an item mean {tokens['mean']:.1f}, min {tokens['min']:.0f}, max {tokens['max']:.0f}",
    ]
    most = max((row["items"] for row in stream["token_histogram"]), default=1)
    for row in stream["token_histogram"]:
        bar = "#" * max(round(_BAR * row["items"] / most), 1 if row["items"] else 0)
        lines.append(f"    {row['from']:>6} - {row['to']:<6} {row['items']:>7} {bar}")
    bad, ignored = (
        ", ".join(f"{count} {kind}" for kind, count in sorted(stream[name].items())) or "none"
        for name in ("bad", "ignored")
    )
    lines.append(f"  made smaller   {stream['downscaled']} items")
    lines.append(f"  left out       {bad}")
    lines += [f"  filtered       {count} {rule}" for rule, count in sorted(stream["filtered"].items())]
    lines.append(f"  texts ignored  {ignored}")
    lines.append(f"  longest wait   {stream['longest_wait_packs']} packs")
    return lines


def _processes(workers: int) -> str:
    return f"{workers} decoding process{'es' if workers > 1 else ''}" if workers else "this process"
