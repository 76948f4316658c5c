"""What the launchers know of the GPU they launch on, and the launch itself."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

WIDE_CAPABILITIES = (9, 10)
"""Hopper and the data centre's Blackwell: their tensor cores take 256 columns at once, and a program may have 227 KB of
shared memory. Blackwell in workstations (12) has neither, and works as Ampere does."""
SYSTEM_BYTES = 1024
"""Of the shared memory of a multiprocessor, for every program."""


class Limits(NamedTuple):
    """Multiprocessors, shared memory that one program may have, and whether it is one of `WIDE_CAPABILITIES`."""

    processors: int
    shared_bytes: int
    wide: bool


INTERPRETER = Limits(3, 163 * 1024, wide=False)
"""Off the GPU: an A100, but with so few multiprocessors that the programs of a backward do walk."""


@cache
def limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor - SYSTEM_BYTES
    return Limits(found.multi_processor_count, shared, wide=found.major in WIDE_CAPABILITIES)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs `kernel` on the GPU of its first argument, a tensor; Triton alone would take the current one."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)
