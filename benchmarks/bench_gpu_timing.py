"""Times, yardsticks and circumstances of the GPU's benchmarks.

On a GPU a run is timed as `triton.testing.do_bench` does it, by events around it with the L2 cache overwritten before,
and with one thing more: the device is held back before each run until Python has launched all of it. The launches of
a small operation take Python longer than the GPU takes to run it; in training they hide behind what it still has to do.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import torch

from benchmarks.rows import git_commit

CACHE_BYTES = 256 * 2**20
HELD_BACK_CYCLES = 4_000_000
"""About 2 ms: longer than Python takes to launch any of the operations."""


class Timer:
    """Medians in milliseconds. On the CPU (a dry run) one run by the clock, which says nothing."""

    def __init__(self, device: torch.device, seconds: float = 0.3) -> None:
        self.device = device
        self.seconds = seconds
        self.cache = torch.empty(CACHE_BYTES // 4 if device.type == "cuda" else 1, dtype=torch.int32, device=device)

    def median_ms(self, run: Callable[[], object], *, cold: bool = True, least: int = 10, most: int = 200) -> float:
        """Of as many runs as fit the timer's seconds, within `least` and `most`.

        Args: cold: clear L2 and hold the device back before each run; without, runs follow each other as in training.
        """
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        for _ in range(3):  # compiles, allocates, and tells how long one run is
            estimate = self._once(run, cold)
        runs = min(most, max(least, int(1e3 * self.seconds / max(estimate, 1e-3))))
        return statistics.median(self._once(run, cold) for _ in range(runs))

    def _once(self, run: Callable[[], object], cold: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.cache.zero_()
            torch.cuda._sleep(HELD_BACK_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def copy_gb_s(timer: Timer, size: int) -> float:
    """GB/s of a copy on the device, bytes read and written, of a tensor of `size` bytes."""
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer.median_ms(lambda: target.copy_(source)) / 1e6


def matmul_tflops(timer: Timer, m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """TFLOP/s of torch's (m, k) times (k, n)."""
    a, b = (torch.randn(*shape, dtype=dtype, device=timer.device) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / timer.median_ms(lambda: a @ b) / 1e9


def about(device: torch.device) -> dict[str, Any]:
    """What a row is of: the device, versions, commit."""
    import triton

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": git_commit(),
        "date": date.today().isoformat(),
    }
