"""Properties of the GPU, and the launch of kernels on it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

WIDE_CAPABILITIES = (9, 10)
"""Hopper and data-centre Blackwell: the tensor cores multiply 256 columns at once, and a program may have 227 KB of
shared memory. Workstation Blackwell (12) has neither, and is treated like Ampere."""
SYSTEM_BYTES = 1024
"""Bytes of a multiprocessor's shared memory that are reserved per program."""


class Limits(NamedTuple):
    """Properties of a GPU: the number of multiprocessors, the bytes of shared memory that one program may have, and
    whether the compute capability is one of `WIDE_CAPABILITIES`."""

    processors: int
    shared_bytes: int
    wide: bool


INTERPRETER = Limits(3, 163 * 1024, wide=False)
"""Limits without a GPU: those of an A100, but with so few multiprocessors that backward programs loop over rows."""


@cache
def limits(device: torch.device) -> Limits:
    """Returns the limits of a GPU; `INTERPRETER` for any other device."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_multiprocessor - SYSTEM_BYTES
    return Limits(properties.multi_processor_count, shared, wide=properties.major in WIDE_CAPABILITIES)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches `kernel` on the GPU of its first argument, a tensor; Triton alone would use the current GPU."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **options)
