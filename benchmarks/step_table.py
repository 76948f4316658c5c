"""Prints the predicted time of training steps on GPUs, and every assumption behind it.

    python benchmarks/step_table.py [--assumptions] [--host-rows CSV --label LABEL]

The recipes' native stage on 8 to 1,024 GPUs, by `univitar_ds.planning.step_time`: nothing here was measured on a GPU.
"before" is the step of this project in November 2026, of which host ratios, collectives and launches were counted;
"after" takes ZeRO-2, graphs of the last pack that are kept, recomputation by memory, a loss in a constant number of
messages, packs balanced by time, one pass of the teacher and cached launchers. `--host-rows` takes the host ratios of
"after" from rows of `bench_host.py`. Rows are written to results/step_table.csv.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, rounded, write_rows
from univitar_ds.config.load import load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import encoder_config
from univitar_ds.planning import gpus
from univitar_ds.planning.step_time import ASSUMPTIONS, Method, Teacher, Work, predict

GPUS = {name: gpus.GPUS[name] for name in ("A100", "H100", "H200")}
RANKS = (8, 64, 256, 1024)
RECIPES = ("univitar_0p3b", "univitar_0p6b", "univitar_1b")
TOKENS_PER_ITEM, ATTENDED, SIZES = 1024, 1500, 24
"""Tokens of an item, mean number of tokens that a token attends to, and sizes in a pack, all of the native stage. They
are chosen near those of photographs at 576 to 5,832 tokens (`bench_packing.py`)."""
BEFORE = Method(
    zero=3,
    host_ratio={8: 4.5, 256: 20, 1024: 88},
    update_collectives=411,
    recompute_by_memory=False,
    kept_packs=0,
    ring=True,
    loss_kernels=36,
    teacher_by_size=True,
    packed_text=False,
    imbalance=1.29,
    fused_host=1.0,
)
"""Counted or measured on a CPU, except for the imbalance, which is predicted (29 to 47 % between single packs)."""
AFTER = Method(
    zero=2,
    host_ratio={8: 1.4, 256: 1.4, 1024: 2.9},
    update_collectives=20,
    recompute_by_memory=True,
    kept_packs=1,
    ring=False,
    loss_kernels=8,
    teacher_by_size=False,
    packed_text=True,
    imbalance=1.02,
    fused_host=0.3,
)
"""The step after the changes, with ZeRO-2's host ratios as they were measured before."""


def work_of(recipe: str, stage: int = 1) -> Work:
    """Returns the work of a recipe's stage; by default of its native one."""
    config = load_config(recipe, [])
    own = config.stages[stage]
    return Work(
        name=config.name,
        encoder=encoder_config(config.model),
        text=config.model.text,
        embed_dim=config.model.embed_dim,
        parameters=_parameters(config),
        token_budget=own.token_budget,
        tokens_per_item=TOKENS_PER_ITEM,
        attended=ATTENDED,
        sizes=SIZES,
        lanes=config.data.lanes,
        checkpoint_every=1,  # before: every block of this stage
        chunk=config.objective.chunk,
    )


def _parameters(config: RunConfig) -> int:
    """Returns the number of trained parameters of both towers, with heads for a teacher of DINOv2-large's width."""
    text = config.model.text
    with torch.device("meta"):
        model = build_contrastive(
            config.model,
            vocab_size=text.vocab_size,
            eos_id=1,
            pad_id=0,
            seed=0,
            teacher_width=Teacher().width,
        )
    return sum(parameter.numel() for parameter in model.parameters())


def host_ratios(path: Path, configuration: str, label: str | None = None) -> dict[int, float]:
    """Returns the host ratio by number of ranks in rows of `bench_host.py`; the last one if there are several.

    Raises: SystemExit if there is no such row.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["configuration"] == configuration]
    found = {int(row["ranks"]): float(row["ratio"]) for row in rows if label is None or row.get("label") == label}
    if not found:
        raise SystemExit(f"{path} has no row of {configuration}" + (f" with the label {label}" if label else ""))
    return found


def rows(before: Method, after: Method) -> Iterator[dict[str, Any]]:
    """Yields a row for each recipe, GPU, number of GPUs and method, with the seconds of all parts."""
    for recipe in RECIPES:
        work = work_of(recipe)
        for name, gpu in GPUS.items():
            for ranks in RANKS:
                for label, method in (("before", before), ("after", after)):
                    step = predict(work, gpu, ranks, method)
                    figures = {"step_s": rounded(step.seconds, 3), "mfu_pct": rounded(100 * step.mfu, 3)}
                    parts = {f"{part}_s".replace(" ", "_"): rounded(value, 3) for part, value in step.parts.items()}
                    yield {"recipe": recipe, "gpu": name, "gpus": ranks, "method": label, **figures, **parts}


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a Markdown table: MFU before and after, and the step after it with its largest parts."""
    yield "| recipe, GPU | " + " | ".join(f"{ranks:,}" for ranks in RANKS) + " |"
    yield "|---|" + "---|" * len(RANKS)
    by_place = {(row["recipe"], row["gpu"], row["gpus"], row["method"]): row for row in found}
    for recipe in RECIPES:
        for gpu in GPUS:
            cells = []
            for ranks in RANKS:
                old, new = (by_place[recipe, gpu, ranks, method] for method in ("before", "after"))
                cells.append(
                    f"{old['mfu_pct']:.0f} -> {new['mfu_pct']:.0f} % ({old['step_s']:.3g} -> {new['step_s']:.3g} s)"
                )
            yield f"| {recipe}, {gpu} | " + " | ".join(cells) + " |"


def assumptions() -> Iterator[str]:
    """Yields a line for each number that the table assumes."""
    for name, one in ASSUMPTIONS.items():
        yield f"{name}: {one.value:g} {one.unit} ({one.kind}: {one.source})"
    for gpu, properties in GPUS.items():
        for name, one in properties.assumptions():
            yield f"{gpu} {name}: {one.value:g} {one.unit} ({one.kind}: {one.source})"
    yield f"items: {TOKENS_PER_ITEM} tokens, attending to {ATTENDED} on average, {SIZES} sizes a pack (chosen)"
    for name, method in (("before", BEFORE), ("after", AFTER)):
        yield f"{name}: {method}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assumptions", action="store_true", help="print every assumption with its source")
    parser.add_argument("--host-rows", type=Path, help="rows of bench_host.py, for the host ratios of `after`")
    parser.add_argument("--label", help="label of these rows")
    arguments = parser.parse_args()
    after = AFTER
    if arguments.host_rows is not None:
        after = replace(after, host_ratio=host_ratios(arguments.host_rows, f"zero{after.zero}", arguments.label))
    found = list(rows(BEFORE, after))
    sys.stdout.write("\n".join([*table(found), *(assumptions() if arguments.assumptions else ())]) + "\n")
    write_rows(RESULTS / "step_table.csv", found)


if __name__ == "__main__":
    main()
