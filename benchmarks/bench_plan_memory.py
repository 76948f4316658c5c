"""Compares the memory that `univitar-ds plan` foresees with the peak memory of training processes on a CPU.

    python -m benchmarks.bench_plan_memory [--cases NAME ...]

A case trains for two steps with the real engine, losses and both towers, on drawn packs without a loader, in one or two
processes (`plan_memory_rank.py`). Measured is the highest resident memory that the kernel has seen since the engine was
built, less what the process held after a step of a small model, which has imported and compiled everything; the larger
of two ranks. glibc gives freed memory back at once, as MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ are set to 64
KiB: otherwise the peak has freed blocks too. Foreseen is `planning.memory`, without any number that was fitted here. A
case without an update runs forward and backward; AdamW's moments are zeros then, which Linux has not handed out yet,
and are left out of both. Rows are written to results/bench_plan_memory.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from typing import Any

from benchmarks.plan_memory_rank import VOCABULARY, deepspeed_of, run_of
from benchmarks.rows import RESULTS, ROOT, git_commit, processor, rounded, write_rows
from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.model.build import describe
from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, load_of, states_of
from univitar_ds.planning.memory import Peak, moments
from univitar_ds.planning.sizes import count_parameters

MIDDLE = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2112}
BASIC = {"zero": 3, "ranks": 1, "packs": 1, "recompute": 0, "bf16": False}
CASES: dict[str, dict[str, Any]] = {
    "tiny": {"encoder": "tiny", "tokens": 8192},
    "tiny, every block recomputed": {"encoder": "tiny", "tokens": 16384, "recompute": 1},
    "tiny, 2 ranks, 2 packs": {"encoder": "tiny", "tokens": 4096, "ranks": 2, "packs": 2, "zero": 2},
    "61M": {"encoder": MIDDLE, "tokens": 2048, "zero": 1},
    "61M, selective": {"encoder": MIDDLE, "tokens": 2048, "zero": 2, "recompute": "selective"},
    "61M, bf16, 2 ranks": {"encoder": MIDDLE, "tokens": 2048, "ranks": 2, "bf16": True},
    "0.3B": {"encoder": "0.3b", "tokens": 512, "sub_group": 20_000_000},
    "0.3B, every block recomputed": {"encoder": "0.3b", "tokens": 1024, "sub_group": 20_000_000, "recompute": 1},
    "0.3B, bf16, 2 ranks": {
        "encoder": "0.3b", "tokens": 512, "sub_group": 20_000_000, "ranks": 2, "bf16": True, "recompute": 2,
    },
    "0.6B, bf16, no update": {
        "encoder": "0.6b", "tokens": 512, "sub_group": 20_000_000, "bf16": True, "update": False, "steps": 1,
    },
}  # fmt: skip


def foreseen(case: dict[str, Any]) -> Peak:
    """Returns the memory of a rank of a case, by the formulas of the plan."""
    config = run_of(case)
    described = describe(config.model, None, vocab_size=VOCABULARY, eos_id=1, pad_id=0)
    counts = count_parameters(config, described, teacher_width=None, classes=None)
    names = ("the case", "its DeepSpeed JSON")
    resolved = resolve_deepspeed(config, case["ranks"], deepspeed_of(case), names)
    place = Placement(case["ranks"], case["ranks"], resolved, on_gpu=False)
    model, stage = PlannedModel(config, described, counts), config.stages[0]
    found = moments(load_of(model, stage, case["ranks"], case["recompute"]), states_of(model, stage, place))
    if not case.get("update", True):
        found.pop("update")
        for parts in found.values():
            parts["optimizer"] /= 3  # the master weights, without two moments
    sizes = {moment: sum(parts.values()) for moment, parts in found.items()}
    moment = max(sizes, key=sizes.__getitem__)
    return Peak(moment, found[moment], sizes)


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
            "imports_gb": rounded(seen["imports"] / 1e9),
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
    found = []
    for row in rows(parser.parse_args().cases):
        print({key: row[key] for key in ("case", "measured_gb", "foreseen_gb", "error_pct", "moment")}, flush=True)
        found.append(row)
    write_rows(RESULTS / "bench_plan_memory.csv", found)


if __name__ == "__main__":
    main()
