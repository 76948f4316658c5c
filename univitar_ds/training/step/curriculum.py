"""The schedules of a run, as pure functions of the run's progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

from univitar_ds.config.stage import Schedule, StageConfig
from univitar_ds.geometry import Modality


@dataclass(frozen=True)
class Progress:
    """Counters of a run. `stage` is the index of the stage that the next step belongs to."""

    stage: int = 0
    step: int = 0
    step_in_stage: int = 0
    samples_in_stage: int = 0
    samples: int = 0
    tokens: int = 0
    bad_samples: int = 0

    def to_dict(self) -> dict[str, int]:
        """Returns the fields by name."""
        return asdict(self)

    def finished(self, stages: Sequence[StageConfig]) -> bool:
        """Whether all stages are done."""
        return self.stage >= len(stages)


def advance(
    progress: Progress, stages: Sequence[StageConfig], *, samples: int, tokens: int, bad_samples: int
) -> Progress:
    """Returns the progress after one more step of `samples` items and `tokens` tokens over all ranks.

    A stage ends with the step that reaches its `samples`; surplus items of that step are not carried over.
    """
    after = replace(
        progress,
        step=progress.step + 1,
        step_in_stage=progress.step_in_stage + 1,
        samples_in_stage=progress.samples_in_stage + samples,
        samples=progress.samples + samples,
        tokens=progress.tokens + tokens,
        bad_samples=progress.bad_samples + bad_samples,
    )
    if after.samples_in_stage >= stages[progress.stage].samples:
        return replace(after, stage=progress.stage + 1, step_in_stage=0, samples_in_stage=0)
    return after


def lr_at(stage: StageConfig, samples_done: int) -> float:
    """Returns the learning rate of the step after `samples_done` items of the stage: warm-up from 0, then the schedule.

    The first step of a stage with warm-up has a learning rate of 0, so it only updates the optimizer's moments.
    """
    if samples_done < stage.warmup_samples:
        return stage.lr * samples_done / stage.warmup_samples
    if stage.lr_schedule == "constant":
        return stage.lr
    decay_samples = stage.decay_samples if stage.lr_schedule == "wsd" else stage.samples - stage.warmup_samples
    done = min(max(samples_done - (stage.samples - decay_samples), 0) / decay_samples, 1.0)
    left = 1 - done if stage.lr_schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * done))
    floor = stage.final_lr_ratio
    return stage.lr * (floor + (1 - floor) * left)


def weight_at(schedule: Schedule, samples_done: int, samples: int) -> float:
    """Returns the weight of a loss at the step after `samples_done` of the `samples` items of a stage."""
    if schedule.kind == "constant":
        return schedule.start
    done = min(samples_done / samples, 1.0)
    moved = done if schedule.kind == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return schedule.start + (schedule.end - schedule.start) * moved


def distills_later(stages: Sequence[StageConfig], progress: Progress) -> bool:
    """Returns whether the next step or a later one may have a distillation weight above 0, which needs the teacher."""
    return any(stage.distill.ever for stage in stages[progress.stage :])


def modality_at(video_ratio: float, step_in_stage: int) -> Modality:
    """Returns the modality of a step by error diffusion: any n consecutive steps have n * video_ratio steps of videos,
    with an error below one.

    The modality depends only on the stage and the step, so all ranks run the same modules in the same order.
    """
    ratio = Fraction(video_ratio).limit_denominator(10**6)  # 0.29 * 100 is 28.999999999999996 in floats
    before, after = math.floor(step_in_stage * ratio), math.floor((step_in_stage + 1) * ratio)
    return "video" if after > before else "image"
