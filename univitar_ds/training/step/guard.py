"""Detection of bad steps: of losses that are not finite, and of spikes from the losses and gradient norms of the
preceding steps.

A spike is a value far above the median of the last steps of the same modality. The distance from the median is measured
in units of 1.4826 times the median absolute deviation (MAD). For a normal distribution, this unit estimates the
standard deviation. Losses are compared directly. Gradient norms are compared by their logarithms, since their
distribution is skewed and typical norms differ by factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor

from univitar_ds.config.schema import GuardConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.training.distributed.process_group import World, gather_json

MAD_TO_STD = 1.4826
"""The standard deviation of a normal distribution divided by its median absolute deviation."""
MIN_LOSS_DEVIATION = 0.02
"""Minimum deviation as a share of the median: otherwise any change of a nearly constant loss would be a spike."""
MIN_NORM_DEVIATION = 0.1
"""Minimum deviation of the natural logarithm of the norm: otherwise any change of a nearly constant norm would be a
spike."""
MAX_NAMED = 512
"""Maximum number of samples that an event names, with an equal share of every rank. With `data.log_samples` the sample
logs have all of them."""


@dataclass
class History:
    """Losses and gradient norms of the last good steps of the current stage, by modality, saved in the checkpoint."""

    stage: int = 0
    values: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    skipped: int = 0
    """Number of consecutive steps, up to the last one, whose updates were skipped."""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> History:
        """Converts parsed JSON, in which (loss, norm) pairs are lists."""
        values = {modality: [(loss, norm) for loss, norm in rows] for modality, rows in content["values"].items()}
        return cls(content["stage"], values, content.get("skipped", 0))

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, see `from_dict`."""
        return {"stage": self.stage, "values": self.values, "skipped": self.skipped}

    def add(self, stage: int, modality: str, loss: float, norm: float, window: int) -> None:
        """Adds a good step and keeps the last `window` steps of its modality. A new stage empties the history first."""
        if stage != self.stage:
            self.stage, self.values = stage, {}
        self.skipped = 0
        rows = self.values.setdefault(modality, [])
        rows.append((loss, norm))
        del rows[:-window]


def named_samples(batches: Sequence[PackedBatch], suspects: Sequence[int], world: World) -> dict[str, list[str]]:
    """Returns the keys of a step's samples for its event: `keys`, of all ranks, at most MAX_NAMED; and `not_finite`,
    the keys of samples whose embeddings are not finite, if there are any. All ranks call it.

    Args: suspects: see `NotFiniteError`."""
    keys = [key for batch in batches for key in batch.keys]
    most = max(1, MAX_NAMED // world.size)
    by_rank = gather_json([keys[:most], [keys[index] for index in suspects[:most]]], world)
    named, broken = ([key for lists in by_rank for key in lists[kind]] for kind in (0, 1))
    return {"keys": named, **({"not_finite": broken} if broken else {})}


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """Returns `loss`, a scalar, with its own gradient if it is finite, and with a gradient of NaN otherwise.

    A loss can overflow while its gradient is finite. With NaN, the check of the gradients, whose result all ranks
    share, finds a loss that is not finite on any rank, without another wait for the device.
    """
    return loss * (loss.detach() * 0 + 1)  # inf * 0 is NaN; a finite loss is multiplied by exactly 1


def spike_reason(history: History, stage: int, modality: str, loss: float, norm: float, cfg: GuardConfig) -> str | None:
    """Returns the reason why a step with finite `loss` and gradient `norm` is a spike; None if it is not a spike."""
    rows = history.values.get(modality, []) if history.stage == stage else []
    if cfg.spike_deviations is None or len(rows) < cfg.min_steps:
        return None
    losses, norms = [row[0] for row in rows], [_log(row[1]) for row in rows]
    checks = (
        ("loss", loss, loss, losses, MIN_LOSS_DEVIATION * abs(median(losses))),
        ("gradient norm", norm, _log(norm), norms, MIN_NORM_DEVIATION),
    )
    for what, reported, value, before, min_deviation in checks:
        middle = median(before)
        deviation = max(MAD_TO_STD * median(abs(other - middle) for other in before), min_deviation)
        if value - middle > cfg.spike_deviations * deviation:
            usual = middle if what == "loss" else math.exp(middle)
            return (
                f"the {what} is {reported:.4g}, {(value - middle) / deviation:.0f} deviations above its median "
                f"of {usual:.4g} over the last {len(rows)} {modality} steps "
                f"(guard.spike_deviations {cfg.spike_deviations:g})"
            )
    return None


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
