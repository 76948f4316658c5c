"""Measures the fill of packs, the differences of cost within a step, the wait of samples, and the cost of packing.

    python benchmarks/bench_packing.py [--photos FOLDER] [--steps 200]

Four lanes of the training loader plan packs from shards; nothing is decoded. The photos are written to shards first, at
their original sizes. The images of every other mix are synthetic and consist of a JPEG header only. A cost budget is a
share of the average cost of a pack full of tokens, for the 0.3B encoder. Rows are written to results/bench_packing.csv.
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import random
import struct
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, git_commit, processor, write_rows
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.load import load_config
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.sampler import packing
from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.data.sampler.lanes import Lane, Plan
from univitar_ds.data.sampler.stream_config import stream_config
from univitar_ds.data.shards.sources import fingerprint, validate_sources
from univitar_ds.data.writing.writer import PackOptions, pack_folder
from univitar_ds.geometry import PATCH
from univitar_ds.model.config import PRESETS
from univitar_ds.model.flops import cost_coefficients

LANES = 4
COST = cost_coefficients(PRESETS["0.3b"])
COST_SHARES = (0.7, 0.9, 1.0, 1.2)
RELEASE = {"min_tokens": 576, "max_tokens": 5832, "divisor_px": 112}
ANY = {"min_tokens": 1, "max_tokens": 8192, "divisor_px": PATCH}


@dataclass(frozen=True)
class Mix:
    """Shards, the sizes at which their images enter the encoder, and the token budget of a pack."""

    name: str
    shards: str
    size: dict[str, int]
    token_budget: int

    def stage(self, cost_budget: float | None) -> StageConfig:
        tflops = None if cost_budget is None else cost_budget / 1e12
        return StageConfig(
            name="s", samples=1, lr=1.0, image=self.size, token_budget=self.token_budget, cost_budget_tflops=tflops
        )


def log_normal(median: float, sigma: float, max_tokens: int) -> Callable[[random.Random], tuple[int, int]]:
    """Returns a function that draws an image's height and width in patches.

    The number of tokens is log-normal and at most `max_tokens`; the aspect ratio is at most 2 : 1.
    """

    def sides(rng: random.Random) -> tuple[int, int]:
        while True:
            tokens, aspect = median * math.exp(rng.gauss(0, sigma)), 2 ** rng.uniform(-1, 1)
            h, w = max(1, round(math.sqrt(tokens * aspect))), max(1, round(math.sqrt(tokens / aspect)))
            if h * w <= max_tokens:
                return h, w

    return sides


def write_headers(folder: Path, sides: Callable[[random.Random], tuple[int, int]], samples: int = 24_000) -> str:
    """Writes shards of images that have a header and no pixels. Returns their folder."""
    folder.mkdir()
    rng = random.Random(0)
    for shard in range(8):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(samples // 8):
                h, w = sides(rng)
                frame = struct.pack(">BHHB", 8, h * PATCH, w * PATCH, 3) + bytes(9)
                image = b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame
                for extension, content in (("jpg", image), ("txt", b"a")):
                    info = tarfile.TarInfo(f"{index:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder)


def max_fill(sizes: list[int], budget: int) -> float:
    """Returns an upper bound on the fill of an epoch of items of similar sizes, where packs have n or n + 1 items.

    Packs of n + 1 items can only contain the smallest items, as many as fit on average; all other packs have at most n.
    Returns 1, since the bound is not useful, if n + 2 of the smallest items fit, counting each item twice: a pack may
    contain samples of two epochs.
    """
    sizes = sorted(sizes)
    few = int(budget / (sum(sizes) / len(sizes)))
    if sum(sorted(sizes * 2)[: few + 2]) <= budget:
        return 1.0
    small = max((n for n, total in enumerate(accumulate(sizes), 1) if total <= n * budget / (few + 1)), default=0)
    return min(1.0, sum(sizes) / budget / (small / (few + 1) + (len(sizes) - small) / few))


def measure(mix: Mix, steps: int, cost_budget: float | None) -> dict[str, Any]:
    """Returns the row of a mix: the packs of all lanes over `steps` steps."""
    stage = mix.stage(cost_budget)
    data = DataConfig(sources=[SourceConfig(path=mix.shards)], lanes=LANES)
    shards = validate_sources(data.sources, [stage])
    rules = stream_config(shards, data=data, stage=stage, lanes=LANES, seed=0, cost=COST)
    lanes = [Lane(rules, LaneCursor(lane, LANES, 0, fingerprint(shards))) for lane in range(LANES)]
    clock = _Clock()
    with clock:
        plans = [[lane.next_plan("image", step) for lane in lanes] for step in range(steps)]
    flat_plans = [plan for step in plans for plan in step]
    sizes = [[sample.tokens for sample in plan.samples] for plan in flat_plans]
    fills = [sum(pack) / mix.token_budget for pack in sizes]
    costs = [_cost(plan) for plan in flat_plans]
    imbalances = [max(step) * LANES / sum(step) - 1 for step in zip(*[iter(costs)] * LANES, strict=True)]
    items = sum(map(len, sizes))
    tokens_by_name = {sample.name: sample.tokens for plan in flat_plans for sample in plan.samples}
    return {
        "steps": steps,
        "lanes": LANES,
        "items_per_pack": round(items / len(flat_plans), 2),
        "largest_item_share": round(max(max(pack) for pack in sizes) / mix.token_budget, 3),
        "fill_mean_pct": round(100 * sum(fills) / len(fills), 3),
        "fill_min_pct": round(100 * min(fills), 2),
        "fill_bound_pct": round(100 * max_fill(list(tokens_by_name.values()), mix.token_budget), 2),
        "cost_fill_mean_pct": None if cost_budget is None else round(100 * sum(costs) / len(costs) / cost_budget, 2),
        "flop_imbalance_mean_pct": round(100 * sum(imbalances) / len(imbalances), 3),
        "flop_imbalance_max_pct": round(100 * max(imbalances), 2),
        "longest_wait_packs": max(plan.index - s.address.since for plan in flat_plans for s in plan.samples),
        "choose_cpu_us_per_sample": round(1e6 * clock.seconds / items, 1),
        "mean_full_pack_cost": sum(costs) / sum(map(sum, sizes)) * mix.token_budget,
    }


class _Clock:
    """Measures the CPU time of `packing.choose` in a `with` block."""

    def __enter__(self) -> _Clock:
        self.seconds = 0.0
        self._choose = packing.choose
        packing.choose = self._timed
        return self

    def __exit__(self, *_: object) -> None:
        packing.choose = self._choose

    def _timed(self, *arguments: Any) -> list[int]:
        began = time.process_time()
        chosen = self._choose(*arguments)
        self.seconds += time.process_time() - began
        return chosen


def _cost(plan: Plan) -> float:
    return sum(packing.item_cost(sample.tokens, COST) for sample in plan.samples)


def mixes(folder: Path, photos: Path | None) -> list[Mix]:
    all_mixes = []
    if photos is not None:
        pack_folder(photos, folder / "photos", PackOptions(verify=False, progress=False))
        recipe = load_config("photos", []).stages[0]
        resolution, budget = recipe.image.model_dump(include=set(ANY)), recipe.token_budget
        shards = str(folder / "photos")
        all_mixes += [Mix(f"photos, recipe, {tokens}", shards, resolution, tokens) for tokens in (budget, 2 * budget)]
        all_mixes.append(Mix("photos, release sizes", shards, RELEASE, 16384))
        all_mixes.append(Mix("photos, own sizes", shards, {**ANY, "max_tokens": 4096}, 16384))
    for median, sigma in ((400, 1.0), (1500, 0.8), (3000, 1.0)):
        shards = write_headers(folder / f"{median}", log_normal(median, sigma, 8192))
        all_mixes.append(Mix(f"log-normal, median {median}, sigma {sigma}", shards, ANY, 16384))
    return all_mixes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder for `data pack`; default: synthetic mixes only")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    about = {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": processor(),
        "python": platform.python_version(),
    }
    rows = []
    with TemporaryDirectory() as folder:
        for mix in mixes(Path(folder), arguments.photos):
            full = None
            for share in (None, *COST_SHARES):
                row = measure(mix, arguments.steps, None if share is None else share * full)
                full = full or row["mean_full_pack_cost"]
                del row["mean_full_pack_cost"]
                settings = {"mix": mix.name, "token_budget": mix.token_budget, "cost_budget_share": share}
                rows.append({**settings, **row, **about})
                sys.stderr.write(f"{rows[-1]}\n")
    write_rows(RESULTS / "bench_packing.csv", rows)


if __name__ == "__main__":
    main()
