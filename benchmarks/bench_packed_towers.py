"""Counts what towers of transformers compute on padded texts or on batches by size, and on packs; needs no GPU.

    python -m benchmarks.bench_packed_towers

Text towers of the recipes on the texts of a pack, forward and backward: tokens, and FLOPs of matrix products and
attention on tensors without data. The numbers of tokens of the texts are log-normal, with the medians of short captions
and of descriptions, and at most the recipe's context length; padded texts are as long as the longest of the pack.

A teacher of 24 blocks on frames of as many sizes as there are frames: operations that write, each of which is a kernel
or more on a GPU. Attention over a pack counts as one operation, as on a GPU.

Rows are written to results/bench_packed_towers.csv.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import RESULTS, git_commit, write_rows
from univitar_ds.config.load import load_config
from univitar_ds.model import packed
from univitar_ds.model.teacher.packing import DINOV2
from univitar_ds.model.teacher.towers import FrameTower, run_with_prefix
from univitar_ds.model.towers import build_text_tower

META = torch.device("meta")
RECIPES = ("univitar_0p6b",)
MEDIANS = {"captions": 12, "descriptions": 32}
SIGMA = 0.5
TEXTS = 64
SIDES = range(12, 28)
"""Rows and columns of the teacher's frames, in patches: 144 to 729 tokens."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    about = {"date": str(date.today()), "commit": git_commit(), "torch": torch.__version__}
    rows = [{**row, **about} for row in (*text_rows(RECIPES), *teacher_rows())]
    write_rows(RESULTS / "bench_packed_towers.csv", rows)
    for row in rows:
        print(f"{row['tower']}, {row['items']}: {row['measure']} {row['apart']} -> {row['packed']} ({row['share']})")


def row_of(tower: str, items: str, measure: str, apart: float, together: float) -> dict[str, Any]:
    share = round(together / apart, 3)
    return {"tower": tower, "items": items, "measure": measure, "apart": apart, "packed": together, "share": share}


def drawn_lengths(median: float, most: int) -> list[int]:
    """Returns the numbers of tokens of the texts of a pack, end of text included."""
    draw = random.Random(0)
    return [min(max(2, round(median * math.exp(draw.gauss(0, SIGMA)))), most) for _ in range(TEXTS)]


def text_rows(recipes: Sequence[str]) -> list[dict[str, Any]]:
    """Returns tokens and FLOPs of the text towers of recipes."""
    rows = []
    for recipe in recipes:
        config = load_config(recipe).model.text
        with torch.device(META):
            tower = build_text_tower(config, vocab_size=config.vocab_size, eos_id=2, pad_id=0)
        for name, median in MEDIANS.items():
            lengths = drawn_lengths(median, config.context_length)
            texts = f"{TEXTS} {name}, median {median} tokens, longest {max(lengths)}"
            tokens = len(lengths) * max(lengths), sum(lengths)
            rows.append(row_of(f"text of {recipe}", texts, "tokens", *tokens))
            tflops = [flops_of(run, lengths) / 1e12 for run in (tower, tower.packed)]
            rows.append(row_of(f"text of {recipe}", texts, "TFLOPs", *(round(one, 4) for one in tflops)))
    return rows


def flops_of(run: Callable[[Tensor, Tensor], Tensor], lengths: Sequence[int]) -> int:
    """Returns the FLOPs of a forward and backward pass over texts."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64, device=META)
    with FlopCounterMode(display=False) as counter:
        run(ids, torch.tensor(lengths)).sum().backward()
    return counter.get_total_flops()


class Operations(TorchDispatchMode):
    """Counts the operations that write."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **kwargs or {})


def teacher_rows() -> list[dict[str, Any]]:
    """Returns the operations of a teacher on a pack of frames of different sizes."""
    from transformers import Dinov2Config, Dinov2Model

    grids = [(1, side, side) for side in SIDES]
    videos = [torch.zeros(1, h * 14, w * 14, 3, dtype=torch.uint8) for _, h, w in grids]
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=24, num_attention_heads=2, patch_size=14)).eval()
    counts = []
    for packing in (None, DINOV2):
        tower = FrameTower(model, run_with_prefix, 14, (0.5,) * 3, (0.5,) * 3)
        tower.packing = packing
        one_call = mock.patch.object(packed, "attention", lambda q, *_, **__: torch.empty_like(q).flatten(1))
        with torch.no_grad(), one_call, Operations() as seen:
            tower(videos, grids)
        counts.append(seen.count)
    return [row_of("DINOv2 of 24 blocks, teacher", f"{len(grids)} frames of {len(grids)} sizes", "operations", *counts)]


if __name__ == "__main__":
    main()
