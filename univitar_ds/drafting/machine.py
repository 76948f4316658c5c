"""The GPUs, memory and cores of a machine."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ASSUMED_GPU_BYTES = 80e9
"""Assumed memory of a GPU for a draft that is made on a machine without GPUs."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """The machine of a draft.

    `cores`: those that the process may use; `memory`: in bytes; `gpu_memory`: bytes of the smallest GPU; `assumed`:
    whether the draft has more GPUs than this machine.
    """

    cores: int
    memory: float
    gpus: int = 0
    gpu_memory: float = 0.0
    assumed: bool = False

    def with_gpus(self, gpus: int | None) -> Machine:
        """Returns the machine with `gpus` GPUs. None: those that it has; 0: only its CPU."""
        if gpus is None or gpus == self.gpus:
            return self
        known = self.gpu_memory if gpus <= self.gpus else self.gpu_memory or ASSUMED_GPU_BYTES
        return replace(self, gpus=gpus, gpu_memory=known, assumed=gpus > self.gpus)


def this_machine() -> Machine:
    """Returns the GPUs, memory and cores that this process may use."""
    import torch

    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max": no limit
        memory = min(memory, float(_CGROUP.read_text(encoding="ascii")))
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    gpus = 0 if on_cpu else torch.cuda.device_count()
    sizes = [float(torch.cuda.get_device_properties(index).total_memory) for index in range(gpus)]
    return Machine(len(os.sched_getaffinity(0)), memory, gpus, min(sizes, default=0.0))
