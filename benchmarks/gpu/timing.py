"""Timer of the GPU benchmarks, reference speeds of copies and products, and the columns for machine and versions."""

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
"""GPU cycles of about 2 ms, more than Python needs to launch any of the operations."""


class Timer:
    """Measures medians in milliseconds on a GPU. On a CPU (a dry run) the result is the time of a single run."""

    def __init__(self, device: torch.device, seconds: float = 0.3, min_runs: int = 10) -> None:
        """Args: seconds: time for the runs of one operation. min_runs: the minimum number of runs, even if they take
        longer than `seconds`."""
        self.device = device
        self.seconds = seconds
        self.min_runs = min_runs

    def median_ms(self, run: Callable[[], object]) -> float:
        """Returns the median of `triton.testing.do_bench`, which overwrites the L2 cache before each run."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        from triton.testing import do_bench

        run()  # compiles and allocates, so that the estimate does not include it
        with _device_held_back():
            estimate = do_bench(run, warmup=0, rep=0)
            milliseconds = max(1e3 * self.seconds, self.min_runs * (estimate + HELD_BACK_CYCLES / 1e6))
            return do_bench(run, warmup=25, rep=milliseconds, return_mode="median")


@contextmanager
def _device_held_back() -> Iterator[None]:
    """Makes do_bench keep the device busy after it clears the cache, until Python has launched the next run.

    Python needs more time to launch a small operation than the device needs to run it. In training this time is hidden:
    the device still has earlier work to do.
    """
    from triton.runtime import driver

    clear = driver.active.clear_cache

    def clear_and_hold_back(cache: Any) -> None:
        clear(cache)
        torch.cuda._sleep(HELD_BACK_CYCLES)

    with patch.object(driver.active, "clear_cache", clear_and_hold_back):
        yield


def copy_gb_s(timer: Timer, size: int) -> float:
    """Returns the GB/s, read and written, of a copy of a tensor of `size` bytes on the device."""
    source = torch.zeros(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer.median_ms(lambda: target.copy_(source)) / 1e6


def matmul_tflops(timer: Timer, m: int, k: int, n: int, dtype: torch.dtype) -> float:
    """Returns the TFLOP/s of torch's matrix product (m, k) times (k, n)."""
    a, b = (torch.randn(*shape, dtype=dtype, device=timer.device) for shape in ((m, k), (k, n)))
    return 2 * m * k * n / timer.median_ms(lambda: a @ b) / 1e9


def about(device: torch.device) -> dict[str, Any]:
    """Returns the columns for the device, the versions, the commit and the date of a row."""
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
