"""Counts one training step of the shipped recipes at full size on a simulated GPU; needs no GPU.

    python benchmarks/bench_simulated_gpu.py [--recipes univitar_0p3b ...] [--zero 2 3] [--ranks 8] [--recompute 0 1]

The step runs on `cuda:0` with the real model, engine and loss, but tensors have no data (docs/performance.md, "A
simulated GPU"). A row has the launches of the step (all operations that write on the device, and those of the fused
kernels and attention among them), its collectives and their bytes in and out, the times it waits for the device, and
the peak memory by the phase that allocated it: `build` is the model and the optimizer, `forward` the activations. Rows
are added to results/bench_simulated_gpu.csv. A setting takes one to several minutes of CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.rows import RESULTS, add_rows, git_commit
from tests.support.simulated_gpu.environment import NoSimulation, prepare, run_simulated

RECIPES = ("univitar_0p3b", "univitar_0p6b", "univitar_1b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--zero", nargs="+", type=int, default=[2], choices=(1, 2, 3))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--recompute", nargs="+", type=int, default=[1], help="model.checkpoint_every")
    parser.add_argument("--packs", type=int, default=1, help="packs per rank and step")
    arguments = parser.parse_args()
    try:
        prepare()
    except NoSimulation as reason:
        raise SystemExit(f"there can be no simulated GPU here: {reason}") from None
    settings = itertools.product(arguments.recipes, arguments.zero, arguments.ranks, arguments.recompute)
    for recipe, zero, ranks, recompute in settings:
        setting = {"recipe": recipe, "zero": zero, "ranks": ranks, "recompute": recompute, "packs": arguments.packs}
        done = run_simulated("tests.support.simulated_gpu.recipe", json.dumps(setting))
        if done.returncode:
            raise SystemExit(f"{setting} failed:\n{done.stderr[-3000:]}")
        row = {"date": date.today().isoformat(), "commit": git_commit(), **json.loads(done.stdout.splitlines()[-1])}
        print(json.dumps(row), flush=True)
        add_rows(RESULTS / "bench_simulated_gpu.csv", [row])


if __name__ == "__main__":
    main()
