"""Finds a rank that makes the others wait, and the phase in which it is slower.

A rank's own time is its time in all phases of a step except the collectives, in which it waits for others. A rank
stands out in a window of steps if its own time is the largest, more than `STANDS_OUT` times the median of the other
ranks, and the difference is more than `SHARE` of the step: the packs of a step differ by a few percent, which is not a
fault of the rank. A rank is reported when it stands out with the same phase in `WINDOWS` consecutive windows that take
at least `SPAN_S` seconds together, since in a single window a checkpoint of another job or a cold cache may slow a rank
down. It is not reported again while it keeps standing out with this phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from univitar_ds.training.watch.phases import COLLECTIVES, PHASES

STANDS_OUT = 1.2
SHARE = 0.05
WINDOWS = 3
SPAN_S = 60.0


@dataclass(frozen=True)
class SlowRank:
    """A rank that makes the others wait. `phase_s`: its seconds per step in `phase`; `others_s`: the median of the
    other ranks."""

    rank: int
    phase: str
    phase_s: float
    others_s: float


def per_step(taken: Tensor) -> Tensor | None:
    """Returns the seconds per step of each rank and phase, (ranks, phases); None if a rank has no timed step.

    Args: taken: the results of `StepClock.take` of all ranks, (ranks, 1 + phases)."""
    steps = taken[:, :1]
    return taken[:, 1:] / steps if bool((steps > 0).all()) else None


def times_over_ranks(seconds: Tensor) -> dict[str, float]:
    """Returns mean and maximum over ranks of the seconds per step in each phase, by their names in a line of metrics.

    Args: seconds: (ranks, phases)."""
    means, largest = seconds.mean(0).tolist(), seconds.amax(0).tolist()
    return {
        name: value
        for phase, mean, most in zip(PHASES, means, largest, strict=True)
        for name, value in ((f"{phase}_s", mean), (f"{phase}_max_s", most))
    }


def slow_rank(seconds: Tensor) -> SlowRank | None:
    """Returns the rank that stands out in one window; None if no rank does.

    Args: seconds: (ranks, phases), per step."""
    if len(seconds) < 2:
        return None
    column = PHASES.index(COLLECTIVES)
    working = seconds.clone()
    working[:, column] = 0
    own = working.sum(1)
    rank = int(own.argmax())
    others = torch.cat([working[:rank], working[rank + 1 :]])
    median = _median(others.sum(1))
    excess = own[rank] - median
    if own[rank] <= STANDS_OUT * median or excess <= SHARE * seconds.sum(1).mean():
        return None
    medians = torch.stack([_median(each) for each in others.T])
    phase = int((working[rank] - medians).argmax())
    return SlowRank(rank, PHASES[phase], float(working[rank, phase]), float(medians[phase]))


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5)


class SlowRanks:
    """Decides after each window of a run whether to report a rank. All ranks have the same times, so they agree."""

    def __init__(self) -> None:
        self._before: tuple[int, str] | None = None
        self._windows, self._span_s, self._reported = 0, 0.0, False

    def event(self, step: int, seconds: Tensor, steps: float) -> dict[str, Any] | None:
        """Returns an entry for events.jsonl if a rank must be reported after this window, else None.

        Args: step: the last step; seconds: (ranks, phases), per step; steps: number of steps in the window."""
        found = slow_rank(seconds)
        which = None if found is None else (found.rank, found.phase)
        if which != self._before or which is None:
            self._before, self._windows, self._span_s, self._reported = which, 0, 0.0, False
        if found is None:
            return None
        self._windows += 1
        self._span_s += float(seconds.sum(1).mean()) * steps
        if self._reported or self._windows < WINDOWS or self._span_s < SPAN_S:
            return None
        self._reported = True
        return {
            "step": step,
            "event": "slow_rank",
            "rank": found.rank,
            "phase": found.phase,
            "phase_s": round(found.phase_s, 6),
            "others_s": round(found.others_s, 6),
        }
