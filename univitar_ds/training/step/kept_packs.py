"""How many packs of a rank keep their graph between the two passes of a step: `objective.grad_cache_keep`.

A kept pack is not embedded a second time (`train_step`), and its activations stay in memory until its backward pass.
With "auto" on a GPU the first steps of each stage keep one pack, which needs no more memory than a pack that runs a
second time. The memory of these steps is measured; the next steps keep as many packs as fit into the memory of every
rank. The number is the same on all ranks, since the ranks gather the weights of ZeRO-3 together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch

from univitar_ds.training.distributed.process_group import World, gather_numbers

MEASURED_STEPS = 8
"""Steps of a stage that are measured: several, since packs of images and of videos differ."""
USABLE = 0.9
"""Share of the process's usable memory that kept packs may fill. The rest is for fragmentation and larger packs."""

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Memory of the device, in bytes."""

    def usable(self) -> int:
        """Returns the memory that this process has reserved or could still allocate."""

    def used(self) -> int:
        """Returns the memory of all tensors now."""

    def peak(self) -> int:
        """Returns the maximum of `used` since `forget_peak`."""

    def forget_peak(self) -> None:
        """Resets the maximum that `peak` returns."""


class GpuMemory:
    """Memory of a GPU, as torch counts it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def usable(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)

    def used(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


class KeptPacks:
    """Chooses `count`, the number of packs that keep their graph in the next step of a stage.

    All ranks create it at the start of a stage, with the same arguments, and measure the same steps.
    """

    def __init__(self, wanted: int | Literal["auto"], packs: int, world: World, memory: Memory | None = None) -> None:
        """Args: wanted: `objective.grad_cache_keep`; packs: packs of a step on this rank; memory: of the device; None:
        as torch counts it, on a GPU."""
        self.packs, self.world = packs, world
        if memory is None and world.device.type == "cuda":
            memory = GpuMemory(world.device)
        self.memory = memory if wanted == "auto" and packs > 1 else None
        self.count = 1 if wanted == "auto" else min(wanted, packs)
        self._left = MEASURED_STEPS if self.memory is not None else 0
        self._states, self._activations = 0, 1

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Runs one step as its body, and measures the memory if `count` is not chosen yet. A step that fails does not
        count."""
        if not self._left:
            yield
            return
        self.memory.forget_peak()
        before = self.memory.used()
        yield
        peak = self.memory.peak()
        self._activations = max(self._activations, peak - before)
        self._states = max(self._states, before)
        self._left -= 1
        if not self._left:
            self._choose()

    def _choose(self) -> None:
        usable = USABLE * self.memory.usable()
        fits = int((usable - self._states) // self._activations)
        fits = int(gather_numbers([fits], self.world).min())
        self.count = min(max(1, fits), self.packs)
        if self.world.is_main:
            logger.info(
                "%d of %d packs of a rank run once in a step (objective.grad_cache_keep auto): one pack needs %.1f GB, "
                "and all else %.1f of %.1f GB",
                *(self.count, self.packs, self._activations / 1e9, self._states / 1e9, usable / 1e9),
            )
