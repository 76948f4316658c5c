"""Tries all combinations of token budget, recomputation and ZeRO for one stage, and finds the fastest that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.errors import ConfigError
from univitar_ds.model.blocks.activations import LADDER, Kind
from univitar_ds.planning.deepspeed_auto import ON_GPUS
from univitar_ds.planning.forecast.plan import Plan
from univitar_ds.planning.forecast.stage import placement, plan_stage
from univitar_ds.planning.forecast.step_load import PlannedModel

BUDGETS = (8192, 16384, 32768, 49152, 65536, 98304, 131072)


@dataclass(frozen=True)
class Trial:
    """One combination. `zero`: name of the DeepSpeed configuration; `kind`: recomputation; `budget`: `token_budget`;
    `memory`: peak of a GPU in bytes; `step_s`: seconds of a step; `speed`: tokens/s of a GPU; `pairs`: of a step.
    Memory and times are predicted."""

    zero: str
    kind: Kind
    budget: int
    memory: float
    fits: bool
    step_s: float
    mfu: float
    speed: float
    pairs: float


def check_stage(config: RunConfig, name: str) -> None:
    """Raises: ConfigError if the run has no stage of this name."""
    names = [stage.name for stage in config.stages]
    if name not in names:
        raise ConfigError(f"--stage {name} is no stage of this run; its stages are {', '.join(names)}")


def stage_named(plan: Plan, name: str | None) -> StageConfig:
    """Returns the stage with this name, or the one that takes longest if `name` is None. Raises: as `check_stage`."""
    if name is None:
        name = max(plan.stages, key=lambda one: one.hours).name
    check_stage(plan.config, name)
    return next(stage for stage in plan.config.stages if stage.name == name)


def sweep(plan: Plan, stage: StageConfig) -> list[Trial]:
    """Returns all combinations for a stage, in the order of ZeRO, recomputation and budget.

    The budgets are BUDGETS that hold the largest item, and that of the run file. A smaller budget also means fewer
    pairs in the loss.
    """
    return list(_trials(plan, stage))


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Returns the fastest combination that fits, or None. Of equally fast ones, that with the least memory."""
    fitting = [one for one in trials if one.fits]
    return max(fitting, key=lambda one: (one.speed, -one.memory), default=None)


def candidates(plan: Plan) -> Iterator[str]:
    """Yields the names of the DeepSpeed configurations without offloading that make sense on the cluster of a plan."""
    for name in ON_GPUS:
        alone = plan.cluster.ranks == 1 and name != "zero2"
        one_machine = plan.cluster.nodes == 1 or plan.cluster.per_node == 1
        if name != "zero3_offload" and not alone and not (name == "zero3_node" and one_machine):
            yield name


def _trials(plan: Plan, stage: StageConfig) -> Iterator[Trial]:
    smallest = max(_largest_items(stage))
    budgets = sorted({stage.token_budget, *(budget for budget in BUDGETS if budget >= smallest)})
    model: PlannedModel = plan.model
    items = next(one.items for one in plan.stages if one.name == stage.name)
    for zero in candidates(plan):
        place = placement(plan.config, plan.cluster, zero)
        for kind in LADDER:
            for budget in budgets:
                changed = stage.model_copy(update={"token_budget": budget})
                own = plan_stage(model, changed, plan.cluster, (zero, place), items, kind=kind, with_budgets=False)
                yield Trial(
                    zero=zero,
                    kind=kind,
                    budget=budget,
                    memory=own.peak.bytes,
                    fits=own.peak.bytes <= plan.cluster.room,
                    step_s=own.step_s,
                    mfu=own.mfu,
                    speed=own.tokens / own.step_s / plan.cluster.ranks,
                    pairs=own.pairs,
                )


def _largest_items(stage: StageConfig) -> Iterator[int]:
    if stage.video_ratio < 1:
        yield stage.image.largest_item(1)
    if stage.video_ratio > 0:
        yield stage.video.largest_item(stage.video_frames)
