"""Compares fused operations with the memory and the matrix units of a GPU, and a training step with the GPU's peak.

    python benchmarks/bench_gpu.py [--only kernels | step] [--encoders 0.3b 0.6b 1b] [--seconds 0.3]
    python benchmarks/bench_gpu.py --device cpu --tiny

Needs the project with torch and triton, gcc and the headers of Python (python3-dev), with which triton compiles its
launcher, and one GPU with 80 GB. Rows of the operations are added to results/bench_gpu_kernels.csv: milliseconds
against plain torch and torch.compile; GB/s (bytes counted by hand in `gpu/counts.py`) against a large copy (copy_) and
a copy of as many bytes (copy_same_) on the device; TFLOP/s of patch_embed against torch's product of the same size,
with rows padded to 16 bytes. Rows of the step are added to results/bench_gpu_step.csv. A case that fails is reported at
the end, and the exit code is 1. The benchmark may take more than ten minutes; `--only` and `--encoders` select parts,
whose rows are added to the same files.

The second form is a dry run of the same code on small shapes on the CPU, with wall-clock times and torch.compile
without a compiler. A dry run writes no rows, since its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import bench_kernels, bench_step  # noqa: E402
from benchmarks.gpu.timing import Timer, about, copy_gb_s, matmul_tflops  # noqa: E402
from benchmarks.rows import RESULTS, add_rows  # noqa: E402
from univitar_ds.config.encoder import EncoderConfig  # noqa: E402
from univitar_ds.model.config import PRESETS  # noqa: E402


@dataclass(frozen=True)
class Plan:
    """The measured encoders by name, the tokens of packs, and the sizes of copies and matrix products to compare."""

    encoders: dict[str, EncoderConfig]
    kernel_tokens: tuple[int, ...]
    step_tokens: int
    step_lengths: tuple[int, ...]
    copy_bytes: int
    matmuls: tuple[tuple[int, int, int], ...]
    compiler: str
    dtype: torch.dtype


FULL = Plan(
    encoders={name: PRESETS[name] for name in ("0.3b", "0.6b", "1b")},
    kernel_tokens=(16384, 65536),
    step_tokens=16384,
    step_lengths=(256, 1024, 4096),
    copy_bytes=2**30,
    matmuls=((8192, 8192, 8192), (16384, 5120, 5120), (16384, 16384, 8192)),
    compiler="inductor",
    dtype=torch.bfloat16,
)
TINY = Plan(
    encoders={"two layers": EncoderConfig(64, 2, 1, 96)},
    kernel_tokens=(96,),
    step_tokens=128,
    step_lengths=(16,),
    copy_bytes=2**16,
    matmuls=((64, 64, 64),),
    compiler="eager",
    dtype=torch.bfloat16,
)


def main() -> int:
    arguments = _arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_gpu needs a CUDA GPU and torch sees none here; the dry run is --device cpu --tiny")
    plan, device = TINY if arguments.tiny else FULL, torch.device(arguments.device)
    if arguments.encoders:
        plan = replace(plan, encoders={name: plan.encoders[name] for name in arguments.encoders})
    from torch._functorch import config as graphs  # slow to import, and not used without a GPU

    # A backward pass is timed repeatedly on one graph, which compiled graphs do not allow by default.
    graphs.donated_buffer = False
    timer = Timer(device, arguments.seconds)
    failures: list[str] = []
    if arguments.only != "step":
        measure_kernels(plan, timer, failures, keep=not arguments.tiny)
    if arguments.only != "kernels":
        measure_steps(plan, timer, failures, keep=not arguments.tiny)
    for failure in failures:
        sys.stderr.write(f"failed: {failure}\n")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, no rows; needed with --device cpu")
    parser.add_argument("--only", choices=("kernels", "step"), help="only this half of the benchmark")
    parser.add_argument("--encoders", nargs="+", choices=FULL.encoders, help="only these encoders")
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds spent on the runs of one operation")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: the full shapes would take a CPU days")
    if arguments.encoders and arguments.tiny:
        parser.error("--encoders chooses among the full shapes, which --tiny leaves out")
    return arguments


def measure_kernels(plan: Plan, timer: Timer, failures: list[str], *, keep: bool) -> None:
    copy = copy_gb_s(timer, plan.copy_bytes)
    for config in plan.encoders.values():
        for tokens in plan.kernel_tokens:
            for case in bench_kernels.cases(config, tokens, timer.device, plan.dtype):
                name = f"{case.op} of {case.pack}, {tokens} tokens, width {case.width}"
                rows = _guarded(failures, name, partial(bench_kernels.measure, case, timer, copy, plan.compiler))
                _report(rows or [], timer.device, "bench_gpu_kernels.csv", keep)
                torch._dynamo.reset()


def measure_steps(plan: Plan, timer: Timer, failures: list[str], *, keep: bool) -> None:
    peak = max(matmul_tflops(timer, *shape, plan.dtype) for shape in plan.matmuls)
    for name, config in plan.encoders.items():
        model = bench_step.build(config, timer.device, plan.dtype)
        for items, grids in bench_step.lengths(plan.step_tokens, plan.step_lengths).items():
            run = partial(bench_step.measure, name, model, items, grids, timer, peak)
            row = _guarded(failures, f"step of {name}, items of {items}", run)
            _report([row] if row else [], timer.device, "bench_gpu_step.csv", keep)


def _guarded(failures: list[str], name: str, run: Callable[[], Any]) -> Any:
    """Returns `run()`. After a failure (out of memory, a missing back end) adds it to `failures` and returns None."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        failures.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _report(rows: list[dict[str, Any]], device: torch.device, file: str, keep: bool) -> None:
    for row in rows:
        sys.stderr.write("  ".join(f"{name} {value}" for name, value in row.items() if value is not None) + "\n")
    if rows and keep:
        add_rows(RESULTS / file, [{**row, **about(device)} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
