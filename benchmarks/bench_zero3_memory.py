"""Measures the memory that a rank's tensors take in a training step under ZeRO-3.

    python benchmarks/bench_zero3_memory.py [--configurations zero3 zero3_node] [--ranks 2 64] [--tree FOLDER]

The model, engine and fake world (machines of 8 ranks) are those of `bench_host.py`: the depth of 0.3B, narrow, with
packs of two small images, so that weights, gradients, optimizer states and what is gathered are nearly all of the
memory. torch's profiler reports every allocation and release of the process from before the model is built. "held" is
what is allocated between two steps, "peak" the most in the last of five steps, both in bytes for each parameter.
`--tree` measures the package and `ds_configs` of another checkout. Each measurement runs in a separate process; rows
are added to results/bench_zero3_memory.csv.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEPS = 5
LAST = "last step"


def measure(name: str, ranks: int) -> dict[str, Any]:
    """Returns the bytes for each parameter. Must run in a process of its own."""
    from benchmarks.bench_host import Shape, build, configuration, engine_step, fake_world, pack
    from univitar_ds.config.deepspeed import NODE, SHARDING
    from univitar_ds.config.schema import OptimizerConfig
    from univitar_ds.training.engine.engine import build_engine

    torch.set_num_threads(1)
    world, shape = fake_world(ranks), Shape()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build(shape)
        total = sum(parameter.numel() for parameter in model.parameters())
        content = configuration(name, shape, model)
        if content.get(SHARDING) == NODE:
            content[SHARDING] = 8
        engine = build_engine(model, OptimizerConfig(), content, world)
        inputs = pack()
        for _ in range(STEPS - 1):
            engine_step(engine, inputs)
        gc.collect()
        with record_function(LAST):
            engine_step(engine, inputs)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    step = next(event for event in events if event.get("name") == LAST and "dur" in event)
    memory = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    before = [allocated for at, allocated in memory if at < step["ts"]]
    during = [allocated for at, allocated in memory if step["ts"] <= at <= step["ts"] + step["dur"]]
    held, peak = before[-1], max(during)
    return {
        "configuration": name,
        "ranks": ranks,
        "parameters": total,
        "held_bytes_per_parameter": round(held / total, 3),
        "peak_bytes_per_parameter": round(peak / total, 3),
    }


def main() -> None:
    """Measures every configuration and number of ranks that the command line asks for, each in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configurations", nargs="+", default=["zero3", "zero3_node"], help="files in ds_configs/")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64], help="numbers of ranks")
    parser.add_argument("--label", default="", help="a name of the code that is measured, a column of the rows")
    parser.add_argument("--tree", type=Path, help="another checkout whose code is measured")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str((options.tree or here).resolve()))
    if options.one:
        print(json.dumps(measure(options.configurations[0], options.ranks[0])), flush=True)
        os._exit(0)  # the fake process group has nothing to close
    from benchmarks.rows import RESULTS, add_rows, git_commit

    for name in options.configurations:
        for ranks in options.ranks:
            command = [sys.executable, __file__, "--one", "--configurations", name, "--ranks", str(ranks)]
            command += ["--tree", str(options.tree)] if options.tree else []
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = {"label": options.label, **json.loads(done.stdout.splitlines()[-1])}
            row |= {"date": date.today().isoformat(), "commit": git_commit(), "torch": torch.__version__}
            print(row, flush=True)
            add_rows(here / RESULTS.relative_to(RESULTS.parents[1]) / "bench_zero3_memory.csv", [row])


if __name__ == "__main__":
    main()
