"""Measures the host time to launch an encoder block's row kernels by Triton and by cached launchers, without a GPU.

    python benchmarks/bench_launch.py

The driver launches nothing, so both times are without CUDA's own launch. Rows are added to results/bench_launch.csv.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.recording_driver import recorded
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.kernels import fused, gpu

WIDTH, HEADS, INNER = 1024, 16, 2816
REPEATS, LAUNCHES = 9, 300


def block() -> list[Callable[[], Any]]:
    """Returns the operations of one block of the 0.3B encoder, on a few tokens in bfloat16."""
    options = {"dtype": torch.bfloat16, "requires_grad": True}
    x, gate = torch.zeros(8, WIDTH, **options), torch.zeros(8, INNER, **options)
    weight, inner = torch.ones(WIDTH, **options), torch.ones(INNER, **options)
    qkv, positions = torch.zeros(8, 3, HEADS, WIDTH // HEADS, **options), torch.zeros(8, 2, dtype=torch.int64)
    return [
        lambda: fused.rms_norm(x, weight, 1e-6),
        lambda: fused.rope2d_qk_norm(qkv, positions, weight, weight, theta=1e4, eps=1e-6),
        lambda: fused.add_norm(x, x, weight, weight, 1e-6),
        lambda: fused.swiglu_norm(gate, gate, inner, 1e-6),
    ]


def launches_of_a_block() -> dict[str, list[tuple[Any, ...]]]:
    """Returns the arguments of `Prepared.launch` in a forward and in a backward pass."""
    found: dict[str, list[tuple[Any, ...]]] = {"forward": [], "backward": []}
    launch, phase = gpu.Prepared.launch, "forward"

    def record(*arguments: Any) -> None:
        found[phase].append(arguments)
        launch(*arguments)

    gpu.Prepared.launch = record
    try:
        for operation in block():
            phase = "forward"
            outputs = operation()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            phase = "backward"
            torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    finally:
        gpu.Prepared.launch = launch
    return found


def by_triton(prepared: gpu.Prepared, grid: Any, tensors: Any, numbers: Any) -> None:
    """Launches a kernel by Triton's own launch, as before launchers were cached."""
    with torch.cuda.device_of(tensors[0]):
        prepared.kernel[grid](*tensors, *numbers, **prepared.options)


def host_us(launch: Callable[..., None], calls: list[tuple[Any, ...]]) -> float:
    """Returns the CPU time of all `calls` in microseconds, the minimum of REPEATS measurements."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for _ in range(LAUNCHES):
            for arguments in calls:
                launch(*arguments)
        times.append((time.process_time() - start) / LAUNCHES * 1e6)
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with recorded(records=False):
        for phase, calls in launches_of_a_block().items():
            triton_us, kept_us = host_us(by_triton, calls), host_us(gpu.Prepared.launch, calls)
            rows.append(
                {
                    "pass": phase,
                    "launches": len(calls),
                    "triton_us": f"{triton_us:.1f}",
                    "kept_us": f"{kept_us:.1f}",
                    "ratio": f"{kept_us / triton_us:.2f}",
                    "load": f"{os.getloadavg()[0]:.0f}",
                    "processor": processor(),
                    "commit": git_commit(),
                }
            )
            print(rows[-1])
    add_rows(RESULTS / "bench_launch.csv", rows)


if __name__ == "__main__":
    main()
