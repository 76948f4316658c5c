"""The peak for MFU: the FLOP/s that a rank can reach, given in the run file or measured at the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from univitar_ds.training.distributed.process_group import World, gather_numbers

MEASUREMENTS, SECONDS = 5, 2.0
"""The number of measurements and their total time. The peak is the best of them, since the load of other programs
varies."""
STEADY = 0.10
"""Measurements that differ by more than this share of the best were made under load."""
PLAUSIBLE_PCT = 90.0
"""Most MFU that is plausible, as a share of the speed of a large matrix product."""
UNDER_LOAD = "peak measured under load"
TOO_LOW = "logging.peak_tflops may be too low"


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of all ranks together. `steady`: whether the measurements agreed on every rank; None for a given peak."""

    tflops: float
    steady: bool | None = None

    def note(self, mfu_pct: float) -> str | None:
        """The reason why an MFU is not reliable; None if it is."""
        if self.steady is None:
            return TOO_LOW if mfu_pct > PLAUSIBLE_PCT else None
        return None if self.steady and mfu_pct <= PLAUSIBLE_PCT else UNDER_LOAD


def find_peak(given: float | None, dtype: torch.dtype, world: World) -> Peak:
    """The peak of all ranks, which all call it: `given` for each of them, or measured on all of them at once."""
    if given is not None:
        return Peak(given * world.size)
    table = gather_numbers([*best(matrix_products(world.device, dtype))], world)
    return Peak(table[:, 0].sum().item(), bool(table[:, 1].all()))


def best(rates: Sequence[float]) -> tuple[float, bool]:
    """The highest rate, and whether all are within STEADY of it."""
    return max(rates), min(rates) >= (1 - STEADY) * max(rates)


def matrix_products(
    device: torch.device, dtype: torch.dtype, *, measurements: int = MEASUREMENTS, seconds: float = SECONDS
) -> list[float]:
    """TFLOP/s of large matrix products in this process with its threads, while other ranks measure too."""
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
    """Runs of `work` per second in each of the measurements, each over its share of `seconds` and at least one run."""
    rates = []
    for _ in range(measurements):
        done, start = 0, clock()
        while not done or clock() - start < seconds / measurements:
            work()
            done += 1
        rates.append(done / (clock() - start))
    return rates
