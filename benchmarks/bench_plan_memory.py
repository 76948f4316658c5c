"""Compares the memory that `univitar-ds plan` predicts with the peak memory of training processes on a CPU.

    python -m benchmarks.bench_plan_memory [--cases NAME ...]

A case trains for two steps with the real engine, losses and both towers, on drawn packs without a loader, in one or two
processes (`plan_memory_rank.py`). `measured_gb` is the peak resident memory since the engine was built, minus the
memory of the process after a step of a small model, which has imported and compiled everything (`subtracted_gb`); of
two ranks the larger one. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are 64 KiB, so that glibc returns freed
memory at once: otherwise the peak would include freed blocks. `foreseen_gb` is the prediction of `planning.memory`, in
which no number was fitted to these measurements. The case without an engine runs the model forward and backward once,
with weights and gradients in bf16. The largest case with an engine, 0.6B, takes 15 GB. Rows replace those of the same
cases in results/bench_plan_memory.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.plan_memory_rank import VOCABULARY, deepspeed_of, run_of
from benchmarks.rows import RESULTS, ROOT, git_commit, processor, rounded, write_rows
from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.model.build import describe
from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, load_of, states_of
from univitar_ds.planning.memory import Peak, moments, peak
from univitar_ds.planning.sizes import count_parameters

MIDDLE = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2112}
SMALL = {**MIDDLE, "num_hidden_layers": 6}
BASIC = {"zero": 3, "ranks": 1, "packs": 1, "recompute": 0, "bf16": False}
CASES: dict[str, dict[str, Any]] = {
    "tiny": {"encoder": "tiny", "tokens": 8192},
    "tiny, every block recomputed": {"encoder": "tiny", "tokens": 16384, "recompute": 1},
    "tiny, 2 ranks, 2 packs": {"encoder": "tiny", "tokens": 4096, "ranks": 2, "packs": 2, "zero": 2},
    "24M": {"encoder": SMALL, "tokens": 256},
    "24M, ZeRO-1": {"encoder": SMALL, "tokens": 256, "zero": 1},
    "24M, ZeRO-2": {"encoder": SMALL, "tokens": 256, "zero": 2},
    "24M, ZeRO-1, 2 ranks": {"encoder": SMALL, "tokens": 256, "zero": 1, "ranks": 2},
    "24M, ZeRO-2, 2 ranks, bf16": {"encoder": SMALL, "tokens": 256, "zero": 2, "ranks": 2, "bf16": True},
    "24M, 2 ranks": {"encoder": SMALL, "tokens": 256, "ranks": 2},
    "44M": {"encoder": MIDDLE, "tokens": 2048, "zero": 1},
    "44M, selective": {"encoder": MIDDLE, "tokens": 2048, "zero": 2, "recompute": "selective"},
    "44M, bf16, 2 ranks": {"encoder": MIDDLE, "tokens": 2048, "ranks": 2, "bf16": True},
    "0.3B": {"encoder": "0.3b", "tokens": 512, "sub_group": 20_000_000},
    "0.3B, fewer tokens": {"encoder": "0.3b", "tokens": 256, "sub_group": 50_000_000},
    "0.3B, every block recomputed": {
        "encoder": "0.3b", "tokens": 256, "sub_group": 50_000_000, "recompute": 1, "steps": 1,
    },
    "0.6B": {"encoder": "0.6b", "tokens": 256, "sub_group": 50_000_000},
    "0.6B, bf16, no engine": {"encoder": "0.6b", "tokens": 512, "bf16": True, "zero": None},
}  # fmt: skip


def foreseen(case: dict[str, Any]) -> Peak:
    """Returns the predicted memory of a rank of a case, by the formulas of the plan."""
    config = run_of(case)
    described = describe(config.model, None, vocab_size=VOCABULARY, eos_id=1, pad_id=0)
    counts = count_parameters(config, described, teacher_width=None, classes=None)
    names = ("the case", "its DeepSpeed JSON")
    if case["zero"] is None:
        return _without_engine(PlannedModel(config, described, counts), case)
    resolved = resolve_deepspeed(config, case["ranks"], deepspeed_of(case), names)
    place = Placement(case["ranks"], case["ranks"], resolved, on_gpu=False)
    model, stage = PlannedModel(config, described, counts), config.stages[0]
    return peak(load_of(model, stage, case["ranks"], case["recompute"]), states_of(model, stage, place))


def _without_engine(model: PlannedModel, case: dict[str, Any]) -> Peak:
    """Returns the memory of a model without an engine: weights and the larger of activations and all gradients."""
    stage, width = model.config.stages[0], 2 if case["bf16"] else 4
    size = width * model.counts.total
    resolved = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 0}, "bf16": {"enabled": case["bf16"]}}
    states = states_of(model, stage, Placement(1, 1, resolved, on_gpu=False))
    states = replace(states, parts={"weights": float(size), "gradients": 0.0})
    parts = moments(load_of(model, stage, 1, case["recompute"]), states)["encoder backward"]
    parts = {"weights": parts["weights"], "encoder activations": parts["encoder activations"]}
    other = {"weights": float(size), "gradients": float(size)}
    return max(Peak("encoder backward", parts), Peak("gradients", other), key=lambda one: one.bytes)


def measured(case: dict[str, Any]) -> dict[str, int]:
    """Returns what the rank with the highest peak has measured. Raises: SystemExit if a rank fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(case["ranks"]),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.plan_memory_rank", json.dumps(case)]
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(case["ranks"])
    ]  # fmt: skip
    found = []
    for process in ranks:
        output, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{case} failed:\n{errors[-3000:]}")
        found.append(json.loads(output.splitlines()[-1]))
    return max(found, key=lambda one: one["peak"])


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        case = {**BASIC, **CASES[name]}
        plan, seen = foreseen(case), measured(case)
        parts = sorted(plan.parts.items(), key=lambda part: -part[1])
        yield {
            "case": name,
            **{key: case[key] for key in ("zero", "ranks", "packs", "recompute", "bf16", "tokens")},
            "parameters_m": rounded(seen["parameters"] / 1e6),
            "subtracted_gb": rounded(seen["imports"] / 1e9),
            "measured_gb": rounded(seen["peak"] / 1e9),
            "foreseen_gb": rounded(plan.bytes / 1e9),
            "error_pct": round(100 * (plan.bytes / seen["peak"] - 1), 1),
            "moment": plan.moment,
            "parts_gb": "; ".join(f"{part} {size / 1e9:.2f}" for part, size in parts if size >= 5e6),
            "cpu": processor(),
            "commit": git_commit(),
            "date": date.today().isoformat(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    file = RESULTS / "bench_plan_memory.csv"
    for row in rows(parser.parse_args().cases):
        print({key: row[key] for key in ("case", "measured_gb", "foreseen_gb", "error_pct", "moment")}, flush=True)
        found = {one["case"]: one for one in kept_rows(file)}
        found[row["case"]] = row
        write_rows(file, [found[name] for name in CASES if name in found])


def kept_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of earlier runs."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


if __name__ == "__main__":
    main()
