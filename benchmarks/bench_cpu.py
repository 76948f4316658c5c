"""Compares a training step of the encoder on a CPU with other implementations of the same model, and with the floor.

    make bench-cpu          (python benchmarks/bench_cpu.py [--turns 12] [--layers 1] [--dtypes fp32 bf16])

The workload is 40 images of 72 to 900 tokens, 12,043 tokens in all, in six packs of about 2,000 tokens (the fp32
buffers of larger packs exceed the memory that malloc keeps, so each buffer causes page faults). Contenders without
packs get the images of a pack as a batch, padded to the longest of the 40 images. With `near lengths` the images are
sorted by length, and a batch of six or seven images is padded to its longest image. `released way, one batch` gets all
40 images at once, since the release has no packs. `timm NaFlexViT, its lengths` gets the batches of timm's training
loader for images that must not be resized: each image in the shortest of five sequence lengths
(`NaFlexMapDatasetWrapper`), one batch per length. A measurement is forward and backward of one pack, in CPU seconds of
this process with one thread. The contenders alternate pack by pack, in an order that rotates, so that other load of the
machine affects all contenders equally. The result is the median over packs of the ratio within a turn, or the ratio of
sums over whole rounds if the images are grouped in another way.

transformers is a requirement of the project. timm is not, and is installed in a separate folder, benchmarks/.peers:

    .venv/bin/python -m pip install --no-deps --target benchmarks/.peers timm torchvision==0.28.0

In the project's environment a torchvision whose build does not fit torch would make the import of transformers fail.
Only timm's contender imports from the separate folder, and needs no operators of torchvision. Without timm its rows are
left out, which is reported. Rows are added to results/bench_cpu.csv.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.cpu import contenders as contenders
from benchmarks.cpu.contenders import Group, Step
from benchmarks.rows import RESULTS, add_rows, git_commit, processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKS = 6
"""Number of packs. Larger packs are slower, see above."""
GRIDS = (
    (16, 12), (18, 27), (13, 6), (13, 16), (17, 13), (12, 12), (17, 17), (10, 10), (26, 25), (13, 10), (9, 8),
    (14, 10), (14, 21), (22, 29), (8, 12), (36, 18), (19, 29), (13, 17), (11, 9), (8, 10), (10, 10), (21, 30),
    (15, 16), (11, 8), (28, 28), (12, 22), (14, 10), (13, 12), (17, 13), (14, 18), (30, 30), (26, 13), (23, 18),
    (12, 17), (10, 19), (13, 20), (8, 13), (23, 17), (23, 35), (15, 15),
)  # fmt: skip
"""Rows and columns of tokens of each image."""

OURS = "ours"
FLOOR = "floor"
CONTENDERS: dict[str, Callable[[int, torch.dtype], Step]] = {
    FLOOR: contenders.floor,
    OURS: functools.partial(contenders.ours, compiled=True),
    "ours, not compiled": functools.partial(contenders.ours, compiled=False),
    "released way": contenders.tables,
    "released way, one batch": contenders.tables,
    "timm NaFlexViT": contenders.timm_naflex,
    "timm NaFlexViT, its lengths": contenders.timm_naflex,
    "timm NaFlexViT, near lengths": contenders.timm_naflex,
    "Siglip2 NaFlex": contenders.siglip2,
    "padded ViT": contenders.padded,
    "padded ViT, near lengths": contenders.padded,
}
TIMM_LENGTHS = (128, 256, 576, 784, 1024)
"""Sequence lengths of timm's training loader."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2 * PACKS, help="packs that each contender runs")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.dtypes:
        write(name, options.layers, measure(DTYPES[name], options.layers, options.turns))


def packed() -> list[list[tuple[int, int]]]:
    """Returns the images in packs of similar numbers of tokens: the longest image first, each to the smallest pack."""
    packs: list[list[tuple[int, int]]] = [[] for _ in range(PACKS)]
    for grid in sorted(GRIDS, key=lambda grid: -grid[0] * grid[1]):
        min(packs, key=lambda pack: sum(h * w for h, w in pack)).append(grid)
    return packs


def by_length() -> list[list[tuple[int, int]]]:
    """Returns the images in PACKS batches of similar lengths."""
    ordered = sorted(GRIDS, key=lambda grid: grid[0] * grid[1])
    bounds = [round(len(ordered) * i / PACKS) for i in range(PACKS + 1)]
    return [ordered[a:b] for a, b in itertools.pairwise(bounds)]


def by_timm() -> dict[int, list[tuple[int, int]]]:
    """Returns the images by the shortest of timm's sequence lengths that is long enough."""
    fitting: dict[int, list[tuple[int, int]]] = {length: [] for length in TIMM_LENGTHS}
    for h, w in GRIDS:
        fitting[next(length for length in TIMM_LENGTHS if h * w <= length)].append((h, w))
    return fitting


def group(grids: list[tuple[int, int]], dtype: torch.dtype, padded_to: int | None = None) -> Group:
    """Returns a group of random images, the same at every call. Args: padded_to: default: the longest image."""
    generator = torch.Generator().manual_seed(0)
    lengths = [h * w for h, w in grids]
    patches = torch.randn(sum(lengths), contenders.PATCH_VALUES, generator=generator).to(dtype)
    grad = torch.randn(sum(lengths), contenders.WIDTH, generator=generator).to(dtype)
    return Group(tuple(grids), patches, grad, padded_to or max(lengths))


def other_batches() -> dict[str, list[tuple[list[tuple[int, int]], int | None]]]:
    """Returns the batches of contenders that do not use the packs: images, and the length to which they are padded.

    With the length None a batch is padded to its longest image."""
    similar = [(grids, None) for grids in by_length()]
    return {
        "released way, one batch": [(list(GRIDS), None)],
        "timm NaFlexViT, its lengths": [(grids, length) for length, grids in by_timm().items()],
        "timm NaFlexViT, near lengths": similar,
        "padded ViT, near lengths": similar,
    }


def measure(dtype: torch.dtype, layers: int, turns: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of each contender in each turn."""
    longest = max(h * w for h, w in GRIDS)
    steps = {}
    for name, build in CONTENDERS.items():
        try:
            steps[name] = build(layers, dtype)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    packs = [group(grids, dtype, longest) for grids in packed()]
    groups = dict.fromkeys(steps, packs)
    for name, parts in other_batches().items():
        if name in steps:
            groups[name] = [group(grids, dtype, length) for grids, length in parts]
    for name, step in steps.items():
        step(groups[name][0])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for turn in range(turns):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            gc.collect()
            start = time.process_time()
            for images in groups[name][turn % PACKS :: PACKS]:
                steps[name](images)
            seconds[name].append(time.process_time() - start)
        detail = ", ".join(f"{name} {values[-1]:.3f}" for name, values in seconds.items())
        print(f"turn {turn}: {detail}", flush=True)
    return seconds


def ratio(seconds: list[float], base: list[float], whole_rounds: bool) -> float:
    """Returns the ratio of `seconds` to `base`: the median over packs, or the ratio of sums over whole rounds."""
    if whole_rounds:
        turns = len(base) // PACKS * PACKS
        return sum(seconds[:turns]) / sum(base[:turns])
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def write(dtype: str, layers: int, seconds: dict[str, list[float]]) -> None:
    regrouped = other_batches().keys()
    rows = [
        {
            "contender": name,
            "dtype": dtype,
            "layers": layers,
            "turns": len(values),
            "cpu_s_per_pack": round(statistics.mean(values), 3),
            "over_floor": round(ratio(values, seconds[FLOOR], name in regrouped), 3),
            "over_ours": round(ratio(values, seconds[OURS], name in regrouped), 3),
            **machine_columns(),
        }
        for name, values in seconds.items()
        if name not in regrouped or len(values) >= PACKS
    ]
    add_rows(RESULTS / "bench_cpu.csv", rows)
    for row in rows:
        print(f"{row['contender']:32} {dtype}  {row['over_floor']:5.2f} x floor  {row['over_ours']:5.2f} x ours")


def machine_columns() -> dict[str, str | int]:
    """Returns the columns for the machine, the versions, the commit and the date."""
    return {
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "timm": getattr(sys.modules.get("timm"), "__version__", ""),
    }


if __name__ == "__main__":
    main()
