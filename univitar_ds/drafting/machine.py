"""The GPUs, memory and cores of a machine."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ASSUMED_GPU_BYTES = 80e9
"""Assumed memory of a GPU for a draft that is made on a machine without GPUs."""
ASSUMED_CORE_FLOPS = 5e10
"""Assumed FLOP/s of a core in matrix products, for a draft that does not measure it."""
_MEASUREMENTS, _SECONDS = 3, 0.3
_CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """The machine of a draft.

    `cores`: those that the process may use; `memory`: in bytes; `gpu_memory`: bytes of the smallest GPU; `assumed`:
    whether the draft has more GPUs than this machine; `core_flops`: FLOP/s of a core in matrix products.
    """

    cores: int
    memory: float
    gpus: int = 0
    gpu_memory: float = 0.0
    assumed: bool = False
    core_flops: float = ASSUMED_CORE_FLOPS

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


def measured_core_flops() -> float:
    """Returns the FLOP/s of a core in large matrix products. Cores differ by a factor of five, by their instructions.

    The CPU time of the thread is counted, so that other programs on the machine change the result little.
    """
    import torch

    from univitar_ds.training.step.peak_flops import repeats_per_s

    side, threads = 1024, torch.get_num_threads()
    a, b = torch.randn(side, side), torch.randn(side, side)
    torch.set_num_threads(1)
    try:
        torch.matmul(a, b)
        rates = repeats_per_s(lambda: torch.matmul(a, b), _MEASUREMENTS, _SECONDS, time.thread_time)
    finally:
        torch.set_num_threads(threads)
    return 2 * side**3 * max(rates)
