"""What a machine has: GPUs, memory and cores."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ASSUMED_GPU_BYTES = 80e9
"""Memory of a GPU that is asked for by number on a machine that has none."""
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """`cores` of the process, bytes of `memory`, number of `gpus`, and bytes of the smallest GPU; `assumed`: whether
    the GPUs are not those of this machine."""

    cores: int
    memory: float
    gpus: int = 0
    gpu_memory: float = 0.0
    assumed: bool = False

    def with_gpus(self, gpus: int | None) -> Machine:
        """Returns the machine with this number of GPUs for each run, None for those that it has; 0 for its CPU."""
        if gpus is None or gpus == self.gpus:
            return self
        known = self.gpu_memory if gpus <= self.gpus else self.gpu_memory or ASSUMED_GPU_BYTES
        return replace(self, gpus=gpus, gpu_memory=known, assumed=gpus > self.gpus)


def this_machine() -> Machine:
    """Returns what this process may use."""
    import torch

    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # "max": no limit
        memory = min(memory, float(_CGROUP.read_text(encoding="ascii")))
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    gpus = 0 if on_cpu else torch.cuda.device_count()
    sizes = [float(torch.cuda.get_device_properties(index).total_memory) for index in range(gpus)]
    return Machine(len(os.sched_getaffinity(0)), memory, gpus, min(sizes, default=0.0))
