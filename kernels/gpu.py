"""Properties of the GPU, and the launch of kernels on it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

WIDE_CAPABILITIES = (9, 10)
"""Hopper and data-centre Blackwell: their tensor cores take 256 columns at once, and a program may have 227 KB of
shared memory. Workstation Blackwell (12) has neither, and is treated like Ampere."""
SYSTEM_BYTES = 1024
"""Shared memory of a multiprocessor that is reserved per program."""


class Limits(NamedTuple):
    """Multiprocessors, shared memory that one program may have, and whether it is one of `WIDE_CAPABILITIES`."""

    processors: int
    shared_bytes: int
    wide: bool


INTERPRETER = Limits(3, 163 * 1024, wide=False)
"""Without a GPU: an A100, but with so few multiprocessors that the programs of a backward loop over rows."""


@cache
def limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor - SYSTEM_BYTES
    return Limits(found.multi_processor_count, shared, wide=found.major in WIDE_CAPABILITIES)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs `kernel` on the GPU of its first argument, a tensor; Triton itself would use the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)
