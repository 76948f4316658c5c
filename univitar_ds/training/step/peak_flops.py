"""The peak FLOP/s for MFU, given in the run file or measured when a run is launched."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from univitar_ds.training.distributed.process_group import World, gather_numbers

MEASUREMENTS, SECONDS = 5, 2.0
"""The number of measurements and their total time in seconds. The peak is the best measurement, since the load of other
programs varies."""
STEADY = 0.10
"""If a measurement is below the best by more than this share of the best, the machine was under load."""
MAX_MFU_PCT = 90.0
"""Maximum plausible MFU, in percent of the speed of a large matrix product."""
UNDER_LOAD = "peak measured under load"
TOO_LOW = "logging.peak_tflops may be too low"


@dataclass(frozen=True)
class Peak:
    """The TFLOP/s of all ranks together, and whether the measurements agreed on every rank (None: not measured)."""

    tflops: float
    steady: bool | None = None

    def note(self, mfu_pct: float) -> str | None:
        """Returns the reason why an MFU is not reliable; None if the MFU is reliable."""
        if self.steady is None:
            return TOO_LOW if mfu_pct > MAX_MFU_PCT else None
        return None if self.steady and mfu_pct <= MAX_MFU_PCT else UNDER_LOAD


def find_peak(tflops_per_rank: float | None, dtype: torch.dtype, world: World) -> Peak:
    """Returns the peak of all ranks, measured on all ranks at once unless it is given. All ranks call it.

    Args: tflops_per_rank: the given peak of one rank, None to measure. dtype: of the matrix products.
    """
    if tflops_per_rank is not None:
        return Peak(tflops_per_rank * world.size)
    table = gather_numbers([*best(matrix_products(world.device, dtype))], world)
    return Peak(table[:, 0].sum().item(), bool(table[:, 1].all()))


def best(rates: Sequence[float]) -> tuple[float, bool]:
    """Returns the highest rate, and whether all rates are within STEADY of the highest."""
    return max(rates), min(rates) >= (1 - STEADY) * max(rates)


def matrix_products(
    device: torch.device, dtype: torch.dtype, *, measurements: int = MEASUREMENTS, seconds: float = SECONDS
) -> list[float]:
    """Returns the TFLOP/s of large matrix products in this process, one value per measurement."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product()
    return [2 * side**3 * rate / 1e12 for rate in repeats_per_s(product, measurements, seconds)]


def repeats_per_s(
    work: Callable[[], None], measurements: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Returns the runs of `work` per second, one value per measurement.

    Each measurement takes its share of `seconds`, and at least one run."""
    rates = []
    for _ in range(measurements):
        done, start = 0, clock()
        while not done or clock() - start < seconds / measurements:
            work()
            done += 1
        rates.append(done / (clock() - start))
    return rates
