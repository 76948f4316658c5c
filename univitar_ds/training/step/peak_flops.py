"""The peak FLOP/s for MFU: given in the run file, published for the GPU, or measured when a run is launched."""

from __future__ import annotations

import re
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
PUBLISHED = (
    (r"GB200\b", 2500.0),  # GB200 Grace Blackwell, 5,000 with sparsity
    (r"B[23]00\b", 2250.0),  # HGX B200 and B300: 36 PFLOP/s with sparsity for 8 GPUs
    (r"GH200\b", 989.0),  # GH200 data sheet, 1,979 with sparsity
    (r"H200 NVL\b", 835.0),  # H200 data sheet, 1,671 with sparsity
    (r"H200\b", 989.0),  # H200 data sheet, SXM, 1,979 with sparsity
    (r"H[18]00 PCIe\b", 756.0),  # H100 data sheet, 1,513 with sparsity
    (r"H100 NVL\b", 835.0),  # H100 data sheet, 1,671 with sparsity
    (r"H[18]00( \d+GB HBM[23]e?| SXM\d?.*)?$", 989.0),  # H100 data sheet, SXM, 1,979 with sparsity
    (r"A[18]00\b", 312.0),  # A100 data sheet, SXM and PCIe
    (r"A30\b", 165.0),  # A30 data sheet
    (r"A40\b", 149.7),  # A40 data sheet
    (r"A10\b", 125.0),  # A10 data sheet
    (r"L40S\b", 362.0),  # L40S data sheet, 733 with sparsity
    (r"L40\b", 181.0),  # L40 data sheet, 362 with sparsity
    (r"L4\b", 121.0),  # L4 data sheet, 242 with sparsity
    (r"RTX 5090$", 209.5),  # whitepaper of the RTX Blackwell architecture, with float32 sums
    (r"RTX 4090$", 165.2),  # whitepaper of the Ada architecture, with float32 sums
    (r"RTX 3090$", 71.0),  # whitepaper of the Ampere GA102 architecture, with float32 sums
)
"""Patterns of GPU names as torch reports them, with NVIDIA's published TFLOP/s in bfloat16 without sparsity; the first
match counts. The figures with sparsity, which data sheets print first, are twice these."""


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
    """Returns the peak of all ranks. All ranks call it.

    The peak is measured on all ranks at once unless it is given, or published for the GPU of every rank.
    Args: tflops_per_rank: the given peak of one rank, None if none is given. dtype: of the matrix products.
    """
    if tflops_per_rank is not None:
        return Peak(tflops_per_rank * world.size)
    if world.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        peaks = gather_numbers([published_peak(torch.cuda.get_device_name(world.device)) or 0.0], world)
        if bool(peaks.all()):
            return Peak(peaks.sum().item())
    table = gather_numbers([*best(matrix_products(world.device, dtype))], world)
    return Peak(table[:, 0].sum().item(), bool(table[:, 1].all()))


def published_peak(gpu: str) -> float | None:
    """Returns the TFLOP/s of a GPU in bfloat16 by its name, see PUBLISHED; None if it is unknown, or part of a GPU."""
    if "MIG" in gpu:
        return None
    return next((tflops for pattern, tflops in PUBLISHED if re.search(rf"\b(?:{pattern})", gpu)), None)


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
    """Returns the number of runs of `work` per second, one value per measurement.

    Each measurement takes an equal part of `seconds`, and has at least one run."""
    rates = []
    for _ in range(measurements):
        done, start = 0, clock()
        while not done or clock() - start < seconds / measurements:
            work()
            done += 1
        rates.append(done / (clock() - start))
    return rates
