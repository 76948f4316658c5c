"""Configuration of the watchdog, which ends a run that hangs, and of profiles."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from univitar_ds.config.section import Positive, Section

Seconds = Annotated[float, Field(ge=1)]


class WatchdogConfig(Section):
    """Limits after which a run counts as hung. Then all ranks write their stacks, and the run ends for a restart."""

    enabled: bool = Field(True, description="end a run that hangs; false: it waits until a collective fails")
    factor: Annotated[float, Field(ge=2)] = Field(
        10.0, description="limit of a step: this many times the median of the last 64 steps, but at least `min_s`"
    )
    min_s: Seconds = Field(480.0, description="minimum limit of a step in seconds, for waits for storage")
    first_step_s: Seconds = Field(
        3600.0,
        description="limit in seconds of the start of a launch or stage until its first step, and of each of its first "
        "3 steps, which compile",
    )
    checkpoint_s: Seconds = Field(3600.0, description="limit of saving a checkpoint, in seconds")
    evaluation_s: Seconds = Field(86400.0, description="limit of an evaluation during or after training, in seconds")
    max_stalls: Annotated[int, Field(ge=1)] = Field(
        3,
        description="times that a run may hang without a new checkpoint in between; one more ends it with exit "
        "code 1, and Slurm does not continue it",
    )


class ProfileConfig(Section):
    """Steps that are profiled."""

    from_step: Positive = Field(description="first step that is profiled; leave out those that compile")
    steps: Annotated[int, Field(ge=1, le=100)] = Field(
        3, description="number of steps in one trace, each several megabytes"
    )
    ranks: Literal["first", "all"] = Field("first", description="ranks that write a trace")
