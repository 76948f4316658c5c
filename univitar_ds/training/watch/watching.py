"""Everything that observes a rank: the clock of its steps, watchdog, profiler and memory snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from univitar_ds.config.schema import RunConfig
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch.collectives import marked_collectives
from univitar_ds.training.watch.memory import MemorySnapshots
from univitar_ds.training.watch.phases import DeviceMarks, HostMarks, StepClock, active
from univitar_ds.training.watch.profile import StepProfiler
from univitar_ds.training.watch.watchdog import watched

ALONE = World(0, 1, 0, torch.device("cpu"))


@contextmanager
def watching(cfg: RunConfig, run: Path, world: World) -> Iterator[StepClock]:
    """Observes this rank during the body, and yields the clock of its steps. All ranks run the body."""
    profiler = StepProfiler(cfg.logging.profile, run, world)
    clock = StepClock(DeviceMarks() if world.device.type == "cuda" else HostMarks(), profiler)
    MemorySnapshots(run, world, cfg.logging.memory_history)
    with active(clock), marked_collectives(), watched(cfg.watchdog, run, world, clock):
        try:
            yield clock
        finally:
            profiler.close()


@contextmanager
def watching_alone(cfg: RunConfig, run: Path, section: str) -> Iterator[None]:
    """Runs the watchdog for a body that only this process runs, after training. Args: section: see `limit_s`."""
    clock = StepClock()
    with active(clock), clock.section(section), watched(cfg.watchdog, run, ALONE, clock):
        yield
