"""Detection of bad steps: a pure rule on the numbers of the preceding steps.

A spike is a value far above the median of the last steps of the same kind, in robust deviations (1.4826 times the
median absolute deviation, the standard deviation of a normal distribution). Losses are compared directly, gradient
norms by their logarithm, since their distribution is skewed and normal values differ by factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from univitar_ds.config.schema import GuardConfig

NORMAL = 1.4826
"""Standard deviations in a median absolute deviation."""
LEAST_LOSS_DEVIATION = 0.02
"""Least deviation as a share of the median: otherwise any change of a nearly constant loss would be a spike."""
LEAST_NORM_DEVIATION = 0.1
"""Least deviation of natural logarithms, for the same reason."""


@dataclass
class History:
    """Losses and gradient norms of the last good steps of the current stage, by modality. Part of the checkpoint."""

    stage: int = 0
    values: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, content: dict[str, Any]) -> History:
        """Reads JSON, which has no tuples."""
        values = {modality: [(loss, norm) for loss, norm in rows] for modality, rows in content["values"].items()}
        return cls(content["stage"], values)

    def to_dict(self) -> dict[str, Any]:
        return {"stage": self.stage, "values": self.values}

    def add(self, stage: int, modality: str, loss: float, norm: float, window: int) -> None:
        """Adds a good step; another stage starts with an empty history."""
        if stage != self.stage:
            self.stage, self.values = stage, {}
        rows = self.values.setdefault(modality, [])
        rows.append((loss, norm))
        del rows[:-window]


def spike(history: History, stage: int, modality: str, loss: float, norm: float, cfg: GuardConfig) -> str | None:
    """The reason why a step of finite `loss` and gradient `norm` is a spike; None if it is not."""
    rows = history.values.get(modality, []) if history.stage == stage else []
    if cfg.spike_deviations is None or len(rows) < cfg.min_steps:
        return None
    losses, norms = [row[0] for row in rows], [_log(row[1]) for row in rows]
    checks = (
        ("loss", loss, loss, losses, LEAST_LOSS_DEVIATION * abs(median(losses))),
        ("gradient norm", norm, _log(norm), norms, LEAST_NORM_DEVIATION),
    )
    for what, detail, value, before, least in checks:
        middle = median(before)
        deviation = max(NORMAL * median(abs(other - middle) for other in before), least)
        if value - middle > cfg.spike_deviations * deviation:
            usual = middle if what == "loss" else math.exp(middle)
            return (
                f"the {what} is {detail:.4g}, {(value - middle) / deviation:.0f} deviations above its median "
                f"{usual:.4g} of {len(rows)} {modality} steps (guard.spike_deviations {cfg.spike_deviations:g})"
            )
    return None


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
