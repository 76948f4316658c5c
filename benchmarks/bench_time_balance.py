"""Measures how equal the predicted times of a step's packs are with `cost_budget_tflops: auto`, by number of lanes.

    python benchmarks/bench_time_balance.py [--photos FOLDER] [--steps 200] [--lanes 4 64 256] [--headroom 1.02 ...]

Lanes of the training loader plan packs of 32,768 tokens from shards of image headers, see `bench_packing.py`: images of
the sizes of photographs in FOLDER at 576 to 5,832 tokens, drawn at random, and log-normal mixes. Time is predicted for
the 0.6B encoder, with attention at 1.5, 2.0 (which balances) and 2.7 times the time of its FLOPs. Each figure is the
mean over the steps of the longest pack of a step over the mean. `time_per_token` is the longest pack's time over the
step's tokens, relative to packs that are all full and equal. `--headroom none` measures packs without a cost budget.
Rows are added to results/bench_time_balance.csv.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_packing import ANY, RELEASE, log_normal, write_headers
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.sampler import balance
from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.data.sampler.stream_config import StreamConfig, stream_config
from univitar_ds.data.shards.sources import fingerprint, validate_sources
from univitar_ds.geometry import PATCH, Resolution
from univitar_ds.model.config import PRESETS
from univitar_ds.model.flops import cost_coefficients

TOKENS, POOL = 32768, 256
COST = cost_coefficients(PRESETS["0.6b"])
RATES = (1.0, 1.5, 2.0, 2.7)
"""Time of attention per FLOP, as a multiple of that of the other operations; 1: FLOPs."""


@dataclass(frozen=True)
class Mix:
    """Shards of image headers, and the sizes at which the images enter the encoder."""

    name: str
    shards: str
    size: dict[str, int]


def photo_sides(folder: Path) -> Callable[[random.Random], tuple[int, int]]:
    """Returns a function that draws the height and width in patches of one of the photographs in a folder.

    Raises: SystemExit if the folder has none.
    """
    from PIL import Image

    sides = []
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as image:
            h, w = Resolution(*RELEASE.values()).grid(image.height, image.width, 1)[1:]
            sides.append((h, w))
    if not sides:
        raise SystemExit(f"{folder} has no file *.jpg; name a folder of photographs")
    return lambda rng: rng.choice(sides)


def config_of(mix: Mix, lanes: int, headroom: float | None) -> tuple[StreamConfig, str]:
    """Returns the configuration of the images' stream, with its cost budget, and the fingerprint of the shards."""
    budget = None if headroom is None else "auto"
    stage = StageConfig(name="s", samples=1, lr=1.0, image=mix.size, token_budget=TOKENS, cost_budget_tflops=budget)
    data = DataConfig(sources=[SourceConfig(path=mix.shards)], lanes=lanes, pool_samples=POOL)
    shards = validate_sources(data.sources, [stage])
    found = stream_config(shards, data=data, stage=stage, lanes=lanes, seed=0, cost=COST)
    balance.HEADROOM = headroom or balance.HEADROOM
    return balance.balanced(found)["image"], fingerprint(shards)


def packs_of(lanes: Sequence[int], mix: Mix, count: int, headroom: float | None, steps: int) -> list[list[tuple]]:
    """Returns (tokens, sum of squared tokens, longest wait) of the packs of some of `count` lanes."""
    config, seen = config_of(mix, count, headroom)
    found = []
    for number in lanes:
        lane = Lane({"image": config}, LaneCursor(number, count, 0, seen))
        plans = [lane.next_plan("image", step) for step in range(steps)]
        sizes = [[sample.tokens for sample in plan.samples] for plan in plans]
        waits = [max(plan.index - sample.address.since for sample in plan.samples) for plan in plans]
        found.append(
            [(sum(pack), sum(one * one for one in pack), wait) for pack, wait in zip(sizes, waits, strict=True)]
        )
    return found


def measure(mix: Mix, lanes: int, headroom: float | None, steps: int, processes: int) -> dict[str, Any]:
    """Returns the row of a mix and number of lanes."""
    began = time.perf_counter()
    parts = [range(first, lanes, processes) for first in range(processes)]
    work = partial(packs_of, mix=mix, count=lanes, headroom=headroom, steps=steps)
    if processes == 1:
        found = [work(parts[0])]
    else:
        with ProcessPoolExecutor(processes) as pool:
            found = list(pool.map(work, parts))
    by_step = list(zip(*[lane for part in found for lane in part], strict=True))
    tokens = sum(pack[0] for step in by_step for pack in step)
    figures = {f"attention_{rate:g}": _imbalance(by_step, rate) for rate in RATES}
    linear, square = COST[0], 2.0 * COST[1]
    total = sum(linear * pack[0] + square * pack[1] for step in by_step for pack in step)
    longest = sum(max(linear * pack[0] + square * pack[1] for pack in step) for step in by_step)
    return {
        "mix": mix.name,
        "lanes": lanes,
        "token_budget": TOKENS,
        "headroom": headroom,
        "steps": steps,
        "fill_mean_pct": round(100 * tokens / (TOKENS * lanes * steps), 2),
        "fill_min_pct": round(100 * min(pack[0] for step in by_step for pack in step) / TOKENS, 1),
        "flop_max_over_mean": round(figures.pop("attention_1"), 4),
        **{f"time_max_over_mean_{name}": round(value, 4) for name, value in figures.items()},
        "time_per_token": round(longest * lanes / total, 4),
        "longest_wait_packs": max(pack[2] for step in by_step for pack in step),
        "wall_s": round(time.perf_counter() - began),
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": processor(),
        "python": platform.python_version(),
    }


def _imbalance(by_step: Sequence[Sequence[tuple]], rate: float) -> float:
    """Returns the mean over the steps of the longest pack's time over the mean."""
    times = [[COST[0] * tokens + rate * COST[1] * squares for tokens, squares, _ in step] for step in by_step]
    return sum(max(step) * len(step) / sum(step) for step in times) / len(times)


def mixes(folder: Path, photos: Path | None, samples: int) -> Iterator[Mix]:
    if photos is not None:
        shards = write_headers(folder / "photos", photo_sides(photos), samples)
        yield Mix("photos, release sizes", shards, RELEASE)
    for median, sigma in ((1500, 0.8), (400, 1.0)):
        shards = write_headers(folder / f"{median}", log_normal(median, sigma, 8192), samples)
        yield Mix(f"log-normal, median {median}, sigma {sigma}", shards, {**ANY, "divisor_px": PATCH})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder of photographs, of which only the sizes are read")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lanes", type=int, nargs="+", default=[4, 64, 256])
    parser.add_argument("--headroom", nargs="+", default=[str(balance.HEADROOM)], help="none: no budget")
    parser.add_argument("--samples-a-lane", type=int, default=400, help="samples of an epoch for each lane")
    parser.add_argument("--only", help="measure only mixes whose name contains this")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        for mix in mixes(Path(folder), given.photos, given.samples_a_lane * max(given.lanes)):
            if given.only and given.only not in mix.name:
                continue
            for lanes in given.lanes:
                for headroom in given.headroom:
                    value = None if headroom == "none" else float(headroom)
                    row = measure(mix, lanes, value, given.steps, min(given.processes, lanes))
                    sys.stderr.write(f"{row}\n")
                    add_rows(RESULTS / "bench_time_balance.csv", [row])


if __name__ == "__main__":
    main()
