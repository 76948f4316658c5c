"""What watches a rank while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.watch.collectives import marked_collectives
from univitar_ds.training.watch.phases import DeviceMarks, HostMarks, StepClock, active


@contextmanager
def watching(world: World) -> Iterator[StepClock]:
    """Watches this rank during the body, and yields the clock of its steps. All ranks run the body."""
    clock = StepClock(DeviceMarks() if world.device.type == "cuda" else HostMarks())
    with active(clock), marked_collectives():
        yield clock
