"""The progress of a run: percent, estimated steps and remaining time, on a terminal's status line and in log lines."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from univitar_ds.config.stage import StageConfig
from univitar_ds.screen import duration, end_status, has_terminal, show_status
from univitar_ds.training.step.curriculum import Progress

STEPS = 100
"""Steps over which speed and samples per step are averaged."""
REDRAW_S = 0.1
"""Minimum seconds between two drawings of the status line."""


@dataclass(frozen=True)
class Outlook:
    """The progress of a run, and an estimate of its end."""

    percent: float
    """Samples of all stages that are done, in percent."""
    steps: int | None
    """Estimated number of steps of the whole run; None before the first step."""
    remaining_s: float | None
    """Estimated seconds to the end of training; None before the first step."""
    samples_per_s: float | None
    """Speed of the last steps; None before the first step."""

    @property
    def eta(self) -> str:
        """The remaining time as text."""
        return "ETA unknown" if self.remaining_s is None else f"ETA {duration(self.remaining_s)}"


class Pace:
    """Estimates the end of a run from the wall clock of its last steps, checkpoints and waits included.

    Packs hold different numbers of samples, so the number of steps is an estimate. Later stages are assumed to take as
    long per sample as the last steps.
    """

    def __init__(
        self, stages: Sequence[StageConfig], start: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lengths = [stage.samples for stage in stages]
        self._clock = clock
        self._marks: deque[tuple[float, int, int]] = deque([(clock(), start.step, start.samples)], STEPS + 1)
        self._launched = True
        self._progress = start

    def add(self, progress: Progress) -> None:
        """Notes the progress after a step."""
        if self._launched and len(self._marks) == 2:  # the first step also compiles and fills the queues of the loader
            self._marks.popleft()
            self._launched = False
        self._marks.append((self._clock(), progress.step, progress.samples))
        self._progress = progress

    def leave_out(self, seconds: float) -> None:
        """Excludes a time without steps, such as that of an evaluation, from speed and estimates."""
        self._marks = deque(((at + seconds, *rest) for at, *rest in self._marks), self._marks.maxlen)

    def outlook(self) -> Outlook:
        """Returns the progress after the last step that was added."""
        stage = self._progress.stage
        done, total = sum(self._lengths[:stage]) + self._progress.samples_in_stage, sum(self._lengths)
        percent = 100 * done / total
        (before, first, few), (now, last, many) = self._marks[0], self._marks[-1]
        samples, seconds = many - few, now - before
        if samples <= 0 or seconds <= 0:
            return Outlook(percent, None, None, None)
        left = total - done
        steps = last + math.ceil(left * (last - first) / samples)
        return Outlook(percent, steps, left * seconds / samples, samples / seconds)


class ProgressLine:
    """The status line of a training run, drawn only if stderr is a terminal."""

    def __init__(self, stages: Sequence[StageConfig], clock: Callable[[], float] = time.monotonic) -> None:
        self._names, self._clock = [stage.name for stage in stages], clock
        self._drawn = -math.inf
        self._mfu = ""

    def note(self, line: dict[str, Any]) -> None:
        """Stores the MFU of a line of metrics, which later drawings show."""
        self._mfu = f"mfu {line['mfu_pct']:.0f} %"

    def draw(self, stage: int, step: int, loss: float, outlook: Outlook) -> None:
        """Draws the line after a step, at most once in REDRAW_S."""
        now = self._clock()
        if now - self._drawn < REDRAW_S or not has_terminal():
            return
        self._drawn = now
        show_status(self.text(stage, step, loss, outlook))

    def text(self, stage: int, step: int, loss: float, outlook: Outlook) -> str:
        """Returns the text of the status line."""
        name = self._names[stage]
        place = name if len(self._names) == 1 else f"{name} ({stage + 1} of {len(self._names)})"
        speed = "" if outlook.samples_per_s is None else f"{outlook.samples_per_s:.1f} samples/s"
        parts = (place, steps_text(step, outlook), f"{outlook.percent:.1f} %", outlook.eta, f"loss {loss:.4f}", speed)
        return " | ".join(filter(None, (*parts, self._mfu)))

    def close(self) -> None:
        """Ends the status line, so that other output begins on a new line."""
        end_status()


def steps_text(step: int, outlook: Outlook) -> str:
    """Returns the step and the estimated number of steps, which is exact after the last step."""
    if outlook.steps is None:
        return f"step {step}"
    return f"step {step} of {'' if outlook.percent >= 100 else '~'}{outlook.steps}"
