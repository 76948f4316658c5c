"""What a run would feed to the model, measured by drawing packs: fill, sizes, unreadable samples, speed."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from univitar_ds.config.schema import RunConfig, StageConfig
from univitar_ds.data.cursor import LaneCursor
from univitar_ds.data.delivery import FailureCount, decoded
from univitar_ds.data.lanes import Lane, Plan, StreamRules
from univitar_ds.data.layout import Modality
from univitar_ds.data.loader import stream_rules
from univitar_ds.data.sources import fingerprint, validate_sources

_BINS = 10
_BAR = 40


def inspect(config: RunConfig, *, packs: int = 50, cost: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Draw and decode `packs` packs of each stage and modality, as the run would from its beginning.

    `cost` are the coefficients of an item's FLOPs (see `packing.item_cost`); without them cost budgets do not bind.
    Returns: JSON with one entry in "streams" for each stage and modality.
    Raises: DataError as training would.
    """
    shards = validate_sources(config.data.sources, config.stages)
    streams = []
    for stage in config.stages:
        rules = stream_rules(
            shards, data=config.data, stage=stage, lanes=config.data.lanes, seed=config.seed, cost=cost
        )
        streams += [_draw(config, stage, rules[modality], packs) for modality in sorted(rules)]
    return {
        "shards": len(shards),
        "bytes": sum(shard.size for shard in shards),
        "fingerprint": fingerprint(shards),
        "workers": config.data.workers,
        "streams": streams,
    }


def render(result: Mapping[str, Any]) -> str:
    """The result of `inspect` as text."""
    lines = [f"{result['shards']} shards, {result['bytes'] / 1e6:.1f} MB, fingerprint {result['fingerprint']}"]
    for stream in result["streams"]:
        lines += ["", *_table(stream)]
        lines.append(f"  {stream['samples_per_s']:.0f} samples/s read and decoded by {_hands(result['workers'])}")
    return "\n".join(lines)


def _draw(config: RunConfig, stage: StageConfig, rules: StreamRules, packs: int) -> dict[str, Any]:
    modality, lanes = rules.modality, config.data.lanes
    failures = FailureCount(config.data.max_bad_in_a_row)
    fills: list[float] = []
    counts: list[int] = []
    tokens: list[int] = []
    bad: Counter[str] = Counter()
    longest_wait = 0
    started, first = time.perf_counter(), 0
    plans = _plans(rules, lanes, packs)
    rendered = decoded(plans, config.data, {modality: rules.size}, stage.token_budget)
    try:
        for pack in rendered:
            if len(fills) == 1:  # the first pack waits for the processes to start and the pool to fill
                started, first = time.perf_counter(), len(tokens)
            failures.check(pack)
            failed = {index for index, _, _ in pack.failures}
            kept = [item for index, item in enumerate(pack.plan.items) if index not in failed]
            tokens += [item.sample.tokens for item in kept]
            fills.append(sum(item.sample.tokens for item in kept) / stage.token_budget)
            counts.append(len(kept))
            bad.update(pack.plan.bad)
            bad.update(kind for _, kind, _ in pack.failures)
            longest_wait = max([longest_wait, *(item.address.waited for item in pack.plan.items)])
    finally:
        rendered.close()
    return {
        "stage": stage.name,
        "modality": modality,
        "packs": len(fills),
        "token_budget": stage.token_budget,
        "fill_pct": _spread([100 * fill for fill in fills]),
        "items_per_pack": _spread(counts),
        "tokens_per_item": _spread(tokens),
        "token_histogram": _histogram(tokens),
        "bad": dict(bad),
        "longest_wait_packs": longest_wait,
        "samples_per_s": round((len(tokens) - first) / (time.perf_counter() - started), 1),
    }


def _plans(rules: StreamRules, lanes: int, packs: int) -> Iterator[Plan]:
    modality: Modality = rules.modality
    identity = fingerprint(rules.shards)
    drawn = [Lane({modality: rules}, LaneCursor(lane, lanes, rules.seed, identity)) for lane in range(lanes)]
    for index, lane in itertools.islice(itertools.product(range(packs), drawn), packs):
        yield lane.next_plan(modality, index)


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"mean": 0.0, "min": 0.0, "max": 0.0}
    return {"mean": round(sum(values) / len(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def _histogram(tokens: Sequence[int]) -> list[dict[str, int]]:
    """At most `_BINS` bins of equal width from the smallest to the largest item; `to` belongs to the bin."""
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
    lines = [
        f"stage {stream['stage']}, {stream['modality']}: {stream['packs']} packs of {stream['token_budget']} tokens",
        f"  fill           mean {fill['mean']:.2f} %, min {fill['min']:.2f} %",
        f"  items a pack   mean {items['mean']:.1f}, min {items['min']:.0f}, max {items['max']:.0f}",
        f"  tokens an item mean {tokens['mean']:.1f}, min {tokens['min']:.0f}, max {tokens['max']:.0f}",
    ]
    most = max((row["items"] for row in stream["token_histogram"]), default=1)
    for row in stream["token_histogram"]:
        bar = "#" * max(round(_BAR * row["items"] / most), 1 if row["items"] else 0)
        lines.append(f"    {row['from']:>6} - {row['to']:<6} {row['items']:>7} {bar}")
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(stream["bad"].items())) or "none"
    lines.append(f"  left out       {bad}")
    lines.append(f"  longest wait   {stream['longest_wait_packs']} packs")
    return lines


def _hands(workers: int) -> str:
    return f"{workers} decoding process{'es' if workers > 1 else ''}" if workers else "this process"
