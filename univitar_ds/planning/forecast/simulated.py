"""Replaces the memory and the collectives of a plan by those of the real training step on a simulated GPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from univitar_ds.config.deepspeed import NODE, SHARDING, on_disk
from univitar_ds.config.stage import StageConfig
from univitar_ds.geometry import TUBELET, Modality
from univitar_ds.planning.counts.batch import pack_sizes
from univitar_ds.planning.forecast.plan import Plan
from univitar_ds.planning.forecast.resources import offloaded_bytes
from univitar_ds.planning.forecast.stage import SimulatedStep, StagePlan
from univitar_ds.planning.forecast.step_load import largest_budget, text_shape, weight_sharers
from univitar_ds.planning.memory import EVALUATION, Peak
from univitar_ds.planning.sizes import encoder_of
from univitar_ds.simulation import process
from univitar_ds.training.engine.optim import trained_parts

_KINDS = ("allgather", "allreduce", "alltoall", "broadcast", "reduce_scatter")


def simulate_plan(plan: Plan, progress: Callable[[int, int], None]) -> Plan:
    """Returns the plan with simulated steps: memory, collectives, launches and waits of each stage.

    A stage whose step cannot be simulated keeps the formulas, and a note has the reason.
    Args: progress: is called before the first step and after each, which may take minutes, with the numbers of steps
        that are simulated and of all.
    Raises: process.NoSimulation if this machine cannot simulate a GPU, or the run has states on a disk.
    """
    process.check_possible()
    if on_disk(plan.place.resolved):
        raise process.NoSimulation(f"{plan.zero} has optimizer states on a local disk, which a step would write")
    cases = [(stage, modality) for stage in range(len(plan.stages)) for modality in _modalities(plan, stage)]
    settings = [setting_of(plan, stage, modality) for stage, modality in cases]
    progress(0, len(cases))
    steps = []
    results = process.simulate(settings, offloaded_bytes(plan.model, plan.place))
    for (_, modality), found in zip(cases, results, strict=True):
        steps.append(_read(modality, found))
        progress(len(steps), len(cases))
    stages, notes = [], list(plan.notes)
    for index, stage in enumerate(plan.stages):
        own = [step for (number, _), step in zip(cases, steps, strict=True) if number == index]
        failed = next((step.error for step in own if step.error is not None), None)
        if failed is None:
            stage = _with_steps(plan, index, own)
        else:
            notes.append(f"stage {stage.name} is computed by formulas, since its step cannot be simulated: {failed}")
        stages.append(stage)
    return replace(plan, stages=stages, notes=notes)


def _modalities(plan: Plan, stage: int) -> list[Modality]:
    return [item.modality for item in plan.stages[stage].items]


def setting_of(plan: Plan, number: int, modality: Modality) -> dict[str, Any]:
    """Returns a `simulation.step.Setting` as an object for JSON."""
    model, own, stage = plan.model, plan.stages[number], plan.config.stages[number]
    encoder = encoder_of(model.description)
    items = next(size.items[1] for size in pack_sizes(stage, encoder) if size.modality == modality)
    text = text_shape(model, trained="text" in trained_parts(plan.config, stage))
    teacher = model.teacher
    return {
        "config": plan.config.model_dump(mode="json"),
        "stage": number,
        "description": model.description,
        "classes": model.classes,
        "teacher": None if teacher is None else (teacher.width, teacher.layers),
        "ranks": plan.cluster.ranks,
        "deepspeed": _without_nodes(plan),
        "recompute": own.kind,
        "kept": own.kept,
        "modality": modality,
        "items": items,
        "grid": grid_of(stage, modality, stage.token_budget // items, encoder.spatial_merge_size),
        "caption": 1 if text is None else text.length,
    }


def _without_nodes(plan: Plan) -> dict[str, Any]:
    """Returns the DeepSpeed configuration with the ranks of a machine as a number: all simulated ranks are on this
    machine."""
    resolved = dict(plan.place.resolved)
    return resolved | {SHARDING: weight_sharers(plan.model, plan.place)} if resolved.get(SHARDING) == NODE else resolved


def grid_of(stage: StageConfig, modality: Modality, tokens: int, merge: int) -> tuple[int, int, int]:
    """Returns (t, h, w) of an item with nearly `tokens` tokens and not more, whose sides differ by about a factor of 2
    at most.

    Args: merge: sides are multiples of it.
    """
    steps = 1 if modality == "image" else max(1, min(stage.video_frames // TUBELET, tokens // merge**2))
    cells = max(1, tokens // steps // merge**2)
    side = math.isqrt(cells)
    height = max(range(max(1, math.isqrt(cells // 2)), side + 1), key=lambda rows: (rows * (cells // rows), rows))
    return steps, height * merge, cells // height * merge


def _read(modality: Modality, found: Mapping[str, Any]) -> SimulatedStep:
    if "error" in found:
        return SimulatedStep(modality, error=found["error"])
    return SimulatedStep(
        modality,
        peak=found["peak"],
        moment=found["moment"],
        launches=found["launches"],
        waits=sum(found["waits"].values()),
        collectives=_by_kind(found["collectives"]),
        collective_bytes=_by_kind(found["collective_bytes"]),
    )


def _by_kind(numbers: Mapping[str, int]) -> dict[str, int]:
    """Returns the sums by kind of collective, whose variants have names such as `allgather_base`."""
    sums: Counter[str] = Counter()
    for name, number in numbers.items():
        sums[next((kind for kind in _KINDS if name.startswith(kind)), name)] += number
    return dict(sums)


def _with_steps(plan: Plan, number: int, steps: Sequence[SimulatedStep]) -> StagePlan:
    """Returns a stage with the memory of its largest step, and the collectives of the step with most of them.

    The memory of an evaluation stays that of the formulas. The largest budgets are those of the formulas for the memory
    that the simulated step leaves: the formulas' error at `token_budget` is taken for that at other budgets.
    """
    stage, config = plan.stages[number], plan.config.stages[number]
    largest = max(steps, key=lambda step: step.bytes)
    most = max(steps, key=lambda step: sum(step.collectives.values()))
    by_formula = max(size for moment, size in stage.peak.by_moment.items() if moment != EVALUATION)
    room = plan.cluster.room * by_formula / largest.bytes
    evaluation = sum(stage.peak.evaluation.values())
    by_moment = {largest.moment: largest.bytes} | ({EVALUATION: evaluation} if evaluation else {})
    evaluates = evaluation > largest.bytes
    return replace(
        stage,
        peak=Peak(
            EVALUATION if evaluates else largest.moment,
            stage.peak.evaluation if evaluates else largest.peak,
            by_moment,
            stage.peak.evaluation,
        ),
        collectives=most.collective_bytes,
        messages=sum(most.collectives.values()),
        group_bytes=0.0,
        group_messages=0,  # counted with the others
        budgets={kind: largest_budget(plan.model, config, plan.place, kind, room) for kind in stage.budgets},
        simulated=tuple(steps),
    )
