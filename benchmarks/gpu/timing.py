"""Times, yardsticks and circumstances of the GPU's benchmarks."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.rows import git_commit

HELD_BACK_CYCLES = 4_000_000
"""About 2 ms: longer than Python takes to launch any of the operations."""


class Timer:
    """Medians in milliseconds. On the CPU (a dry run) one run by the clock, which says nothing."""

    def __init__(self, device: torch.device, seconds: float = 0.3, least: int = 10) -> None:
        """Args: what is spent on runs of one operation, and how many there are even if they take longer."""
        self.device = device
        self.seconds = seconds
        self.least = least

    def median_ms(self, run: Callable[[], object]) -> float:
        """By `triton.testing.do_bench`: events around each run, the L2 cache overwritten before it."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        from triton.testing import do_bench

        run()  # compiles and allocates, so that the next one tells how long a run is
        with _device_held_back():
            estimate = do_bench(run, warmup=0, rep=0)
            milliseconds = max(1e3 * self.seconds, self.least * (estimate + HELD_BACK_CYCLES / 1e6))
            return do_bench(run, warmup=25, rep=milliseconds, return_mode="median")


@contextmanager
def _device_held_back() -> Iterator[None]:
    """Inside, do_bench's clearing of the cache also keeps the device busy until Python has launched what comes next.

    The launches of a small operation take Python longer than the device takes to run it; in training this is hidden by
    work that the device still has to do.
    """
    from triton.runtime import driver

    clear = driver.active.clear_cache

    def clear_and_hold_back(cache: Any) -> None:
        clear(cache)
        torch.cuda._sleep(HELD_BACK_CYCLES)

    with patch.object(driver.active, "clear_cache", clear_and_hold_back):
        yield


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
