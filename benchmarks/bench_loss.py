"""Counts what a step of the contrastive losses costs a rank: messages, bytes that it sends, and kernels.

    python benchmarks/bench_loss.py [--ranks 8 64 256 1024] [--width 1152] [--chunk 1024]

Nothing is timed. This process is the last rank of a fake process group (`tests.support.messages`), so no other process
is needed. The kernels are those of plain torch on a CPU; `kernels/README.md` has those of a chunk on a GPU. A row with
32 texts on each rank is a step of many ranks, 8,192 texts of all ranks a step that is divided among them. The bytes are
those of a ring of ranks, in which a gather sends all texts but a rank's own. Rows are added to results/bench_loss.csv.

The rows of commit 00232f8 were counted in the same way in a checkout of that commit, with the names that it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rows import RESULTS, add_rows, git_commit
from tests.support.messages import counted, fake_process_group
from univitar_ds.objectives.exchange import GATHERED_BYTES, Exchange
from univitar_ds.objectives.sigmoid import sigmoid_loss
from univitar_ds.objectives.softmax import softmax_loss

LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss}
TEXTS_OF_A_RANK, TEXTS_OF_ALL = 32, 8192


def measured(name: str, ranks: int, own: int, options: argparse.Namespace, limit: int) -> dict[str, Any]:
    """Returns the row of a loss with `own` texts on each rank."""
    generator = torch.Generator().manual_seed(0)
    vision, text = (
        torch.nn.functional.normalize(torch.randn(own, options.width, generator=generator)) for _ in range(2)
    )
    ids, scale, bias = torch.arange(own), torch.tensor([10.0]), torch.tensor([-10.0])

    def step(**settings: Any) -> None:
        exchange = Exchange(own, vision.device, **settings)
        LOSSES[name](vision, text, scale, bias, ids, chunk=options.chunk, exchange=exchange)

    with fake_process_group(ranks, rank=ranks - 1):
        if limit != GATHERED_BYTES:
            step(limit=limit)  # makes the groups of ranks
        found = counted(step, limit=limit)
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "loss": name,
        "ranks": ranks,
        "texts": ranks * own,
        "width": options.width,
        "chunk": options.chunk,
        "limit_bytes": limit,
        "messages": sum(count for kind, count in found.messages.items() if not kind.startswith("recv")),
        "sent_bytes": round(found.sent),
        "kernels": sum(found.kernels.values()),
    }


def cases(ranks: list[int], width: int) -> Iterator[tuple[int, int, int]]:
    """Yields (ranks, texts of a rank, limit): both kinds of steps, and the largest world in about 8 groups."""
    for size in ranks:
        yield size, TEXTS_OF_A_RANK, GATHERED_BYTES
    for size in ranks:
        yield size, TEXTS_OF_ALL // size, GATHERED_BYTES
    yield ranks[-1], TEXTS_OF_A_RANK, ranks[-1] * TEXTS_OF_A_RANK * (width + 4) * 4 // 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256, 1024])
    parser.add_argument("--width", type=int, default=1152, help="numbers of an embedding")
    parser.add_argument("--chunk", type=int, default=1024, help="texts that are compared at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_loss.csv")
    options = parser.parse_args()
    rows = []
    for name in LOSSES:
        for ranks, own, limit in cases(options.ranks, options.width):
            rows.append(measured(name, ranks, own, options, limit))
            print(*rows[-1].values(), flush=True)
    add_rows(options.out, rows)


if __name__ == "__main__":
    main()
