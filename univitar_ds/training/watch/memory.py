"""Snapshots of a GPU's memory by torch when an allocation fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from univitar_ds.config.run_folder import MEMORY
from univitar_ds.training.distributed.process_group import World

ENTRIES = 100_000
"""Maximum number of allocations and frees in a snapshot that have Python stacks, if stacks are recorded."""

logger = logging.getLogger(__name__)


class Allocator(Protocol):
    """The allocator of a GPU."""

    def observe(self, failed: Callable[..., None]) -> None:
        """Calls `failed` before an allocation raises, while all memory is still held."""

    def record(self, entries: int) -> None:
        """Records the Python stacks of the last `entries` allocations and frees from now on."""

    def dump(self, path: str) -> None:
        """Writes a snapshot."""


class CudaAllocator:
    """torch's allocator."""

    def observe(self, failed: Callable[..., None]) -> None:
        torch._C._cuda_attach_out_of_memory_observer(failed)

    def record(self, entries: int) -> None:
        torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=entries)

    def dump(self, path: str) -> None:
        torch.cuda.memory._dump_snapshot(path)


class MemorySnapshots:
    """Writes one snapshot into the run's folder when an allocation of this rank fails.

    torch writes a pickle, which https://pytorch.org/memory_viz shows; this program never reads it.
    """

    def __init__(self, run: Path, world: World, history: bool, allocator: Allocator | None = None) -> None:
        """Args: history: whether stacks of allocations are recorded; allocator: None: torch's, on a GPU."""
        self.path = run / MEMORY / f"rank{world.rank:05d}.pickle"
        self._allocator, self._written = allocator, False
        if allocator is None and world.device.type == "cuda":
            self._allocator = CudaAllocator()
        if self._allocator is not None:
            self._allocator.observe(self._failed)
            if history:
                self._allocator.record(ENTRIES)

    def _failed(self, *_: Any) -> None:
        """Called by the allocator. Raises nothing: an error here would hide the one of the allocation."""
        if self._written:
            return
        self._written = True
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._allocator.dump(str(self.path))
        except Exception as error:
            logger.warning("no snapshot of the memory: %s: %s", type(error).__name__, error)
            return
        logger.warning("out of memory: snapshot in %s (open it at https://pytorch.org/memory_viz)", self.path)
