"""Holds out a part of data without splits, so that a drafted run is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from univitar_ds.data.shards.hold_out import HELD_OUT, REST
from univitar_ds.data.tools.survey import Survey
from univitar_ds.geometry import Modality

_SHARES = ((100, 0.2), (1_000, 0.1), (20_000, 0.05))
"""Share by number of samples: few samples need a larger one for figures that mean something."""
_ENOUGH = 1_000
"""Number of samples that are held out of larger data."""
_STEP, _MOST = 0.05, 0.5


def divided(surveys: Sequence[Survey], fewest: int) -> list[Survey]:
    """Returns the surveys of sources, those without splits with the counts of two parts and their `hold_out`.

    Args: fewest: the number of samples that must be left to train on; if there are fewer, nothing is divided.
    """
    total = sum(sum(survey.counts[survey.training].values()) for survey in surveys)
    found = [_divided(survey, _share(total)) if _has_no_splits(survey) else survey for survey in surveys]
    left = sum(sum(survey.counts[survey.training].values()) for survey in found)
    return found if left >= fewest else list(surveys)


def _has_no_splits(survey: Survey) -> bool:
    return len(survey.counts) == 1 and survey.training != HELD_OUT


def _share(samples: int) -> float:
    share = next((share for most, share in _SHARES if samples < most), None)
    return share if share is not None else float(f"{_ENOUGH / samples:.1g}")


def _divided(survey: Survey, share: float) -> Survey:
    """Returns the survey with two parts. If all samples were seen, the share is large enough for one of them."""
    kinds = survey.counts[survey.training]
    numbers = [number for own in survey.numbers.values() for number in own]
    while numbers and min(numbers) >= share and share < _MOST:
        share = round(share + _STEP, 2)
    held_out = {kind: _held_out(survey, kind, count, share) for kind, count in kinds.items()}
    if not 0 < sum(held_out.values()) < sum(kinds.values()):
        return survey
    rest = {kind: count - held_out[kind] for kind, count in kinds.items()}
    training = survey.training or REST
    return replace(survey, counts={training: rest, HELD_OUT: held_out}, training=training, hold_out=share)


def _held_out(survey: Survey, kind: Modality, count: int, share: float) -> int:
    """Returns how many samples are held out: exactly if all were seen, else about; of files at least one of two."""
    if survey.numbers:
        return sum(number < share for number in survey.numbers.get(kind, ()))
    return max(round(share * count), 1 if count > 1 and not survey.packed else 0)
