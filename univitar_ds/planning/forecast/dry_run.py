"""Predicts the memory and time of a step on this machine, for `train --dry-run`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from univitar_ds.drafting.machine import this_machine
from univitar_ds.planning.checks import Inputs
from univitar_ds.planning.counts.batch import Means
from univitar_ds.planning.deepspeed_auto import ranks_of
from univitar_ds.planning.forecast.cluster import USABLE, Cluster, this_gpu
from univitar_ds.planning.forecast.items import items_of
from univitar_ds.planning.forecast.stage import plan_stage
from univitar_ds.planning.forecast.step_load import (
    Placement,
    PlannedModel,
    fitting_recomputation,
    peak_of,
    teacher_memory,
)
from univitar_ds.planning.sizes import Counts, amount


def planned(
    inputs: Inputs, description: Mapping[str, Any], counts: Counts, ranks: int
) -> tuple[PlannedModel, Placement]:
    """Returns the model of a checked run, and its placement: on the GPUs of this machine, or on its CPU if it has none.

    Args: description: `ContrastiveModel.description` of the model; ranks: number of ranks of the run.
    """
    machine, config = this_machine(), inputs.config
    teacher = None if inputs.teacher is None else teacher_memory(config, inputs.teacher.width, ranks=ranks)
    node = ranks_of(ranks, machine, os.environ).node
    return PlannedModel(config, description, counts, teacher), Placement(
        ranks, node, inputs.resolved, on_gpu=machine.gpus > 0
    )


def step_lines(model: PlannedModel, place: Placement, means: Means) -> Iterator[str]:
    """Yields lines with the memory of a step of full packs in each stage, and on a known GPU its time.

    The formulas are those of `univitar-ds plan`. Args: means: expected tokens per item, if known.
    """
    config, machine = model.config, this_machine()
    room = USABLE * machine.gpu_memory if place.on_gpu else math.inf
    gpu = this_gpu() if place.on_gpu else None
    for stage in config.stages:
        kind = fitting_recomputation(model, stage, place, room)
        found = peak_of(model, stage, place, kind, evaluates=True)
        parts = sorted(found.parts.items(), key=lambda part: -part[1])
        sums = ", ".join(f"{name} {amount(size)}" for name, size in parts if size > 0.01 * found.bytes)
        need = f"a rank needs {amount(found.bytes)} at its peak ('{found.moment}')"
        yield f"{stage.name}: {need}, checkpoint_every {kind}: {sums}"
        if found.bytes > room:
            yield f"    TOO MUCH: {amount(room)} of a GPU may be filled; see `univitar-ds plan`"
        if gpu is not None:
            cluster = Cluster(max(1, place.ranks // place.node), place.node, gpu)
            where, items = (config.deepspeed, place), items_of(stage, means, None)
            own = plan_stage(model, stage, cluster, where, items, kind=kind, with_budgets=False)
            yield f"    {own.step_s:.3g} s a step and {100 * own.mfu:.2g} % MFU on {gpu}, predicted, not measured"
    if not place.on_gpu:
        yield "in addition: what the process holds after its imports (0.6 GB), and decoding processes"
