"""Measures the text tower of a recipe as it is and with its layers compiled, on a CPU.

    python benchmarks/bench_compiled_text.py [--layers 2] [--turns 7]

Layers of the tower run forward and backward on batches of padded texts, whose sizes change from batch to batch as they
do in training (`torch.compile(dynamic=True)`). CPU seconds of one thread; `first_s` is the first turn, which compiles.
Both run in each turn: `ratio` is the median over the turns of compiled over plain. Rows
are added to results/bench_compiled_text.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_packed_towers import MEDIANS, drawn_lengths
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.load import load_config
from univitar_ds.model.towers import build_text_tower

RECIPE = "univitar_0p3b"
AT_ONCE = 16
"""Texts of a batch."""


def batches(median: float, longest: int) -> list[tuple[Tensor, Tensor]]:
    """Returns (token ids, lengths) of batches of texts, each padded to its longest."""
    lengths = torch.tensor(drawn_lengths(median, longest)).split(AT_ONCE)
    return [(torch.zeros(len(some), int(some.max()), dtype=torch.int64), some) for some in lengths]


def seconds(tower: nn.Module, texts: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the CPU seconds of a forward and backward pass over batches."""
    begin = time.process_time()
    for ids, lengths in texts:
        tower(ids, lengths).float().sum().backward()
    return time.process_time() - begin


def measure(layers: int, turns: int, dtype: torch.dtype, median: float) -> dict[str, Any]:
    """Returns the row of a number type and of a median of tokens."""
    text = load_config(RECIPE, []).model.text.model_copy(update={"layers": layers})
    towers = []
    for _ in range(2):
        torch.manual_seed(0)
        towers.append(build_text_tower(text, vocab_size=1024, eos_id=2, pad_id=0).to(dtype))
    plain, compiled = towers
    for layer in compiled.model.encoder.layers:
        layer.compile(dynamic=True)
    texts = batches(median, text.context_length)
    first = seconds(compiled, texts)
    seconds(plain, texts)
    times = [(seconds(plain, texts), seconds(compiled, texts)) for _ in range(turns)]
    with torch.no_grad():
        off = max((plain(*one) - compiled(*one)).abs().max().item() for one in texts)
    return {
        "recipe": RECIPE,
        "layers": layers,
        "dtype": str(dtype).removeprefix("torch."),
        "median_tokens": median,
        "texts": sum(len(ids) for ids, _ in texts),
        "batches": len({ids.shape for ids, _ in texts}),
        "turns": turns,
        "first_s": round(first, 1),
        "plain_s": round(statistics.median(one for one, _ in times), 3),
        "ratio": round(statistics.median(other / one for one, other in times), 3),
        "ratio_min": round(min(other / one for one, other in times), 3),
        "ratio_max": round(max(other / one for one, other in times), 3),
        "largest_difference": off,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {"date": date.today().isoformat(), "commit": git_commit(), "cpu": processor(), "torch": torch.__version__}
    for dtype in (torch.float32, torch.bfloat16):
        for median in MEDIANS.values():
            row = {**measure(options.layers, options.turns, dtype, median), **about}
            print(row, flush=True)
            add_rows(RESULTS / "bench_compiled_text.csv", [row])


if __name__ == "__main__":
    main()
