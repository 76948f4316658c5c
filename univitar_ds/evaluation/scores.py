"""A figure and its chance level; ranks with ties between equal scores.

Equal scores (closer than `TIE`, the rounding of a float32 cosine) are ordered at random and the expectation
over that order is taken. So a model that gives everything the same embedding gets exactly the chance level,
and the order of the data has no effect.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

TIE = 1e-6
"""Cosines closer than this are equal."""
CHUNK, CELLS = 1024, 1 << 26
"""Most queries compared at a time, and most scores of them, about 1.7 GB; they limit the memory and do not change
results."""


@dataclass(frozen=True)
class Figure:
    """One measured share.

    `value` and `chance` are in 0..1; `n` queries were averaged, each choosing among `candidates`.
    """

    task: str
    measure: str
    modality: str
    value: float
    chance: float
    n: int
    candidates: int
    set: str | None = None

    def to_dict(self) -> dict[str, object]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def chunks(queries: int, candidates: int) -> tuple[Tensor, ...]:
    """Rows of the queries to compare at a time, in order."""
    return torch.arange(queries).split(max(1, min(CHUNK, CELLS // max(candidates, 1))))


def hit_at(k: int, better: Tensor, tied: Tensor, right: Tensor) -> Tensor:
    """Probability that one of the first `k` results is right, over random orders of equal scores.

    Args, each (n,) integer: wrong candidates that score `better` than the best right one, wrong ones `tied`
    with it, and `right` ones tied with it, itself included.
    Returns: (n,) float64.
    """
    free = (k - better).clamp(min=0)
    return 1 - _none_drawn(free, tied, right)


def chance_at(k: int, right: int, candidates: int) -> float:
    """Probability that a random order of `candidates` has one of `right` right ones among its first `k`."""
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k) if k < candidates else 1.0


def rank_counts(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `hit_at` needs, from scores (n, m) and a mask of the right candidates (n, m), at least one a row."""
    assert bool(is_right.any(dim=1).all()), "a query without a right answer cannot be scored"
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
    near = (scores - best).abs() <= TIE
    better = (scores > best) & ~near & ~is_right
    return better.sum(1), (near & ~is_right).sum(1), (near & is_right).sum(1)


def _none_drawn(draws: Tensor, wrong: Tensor, right: Tensor) -> Tensor:
    """Probability that `draws` without replacement from `wrong` + `right` are all wrong; (n,) float64."""
    draws, wrong, right = draws.double(), wrong.double(), right.double()
    possible = draws <= wrong
    left = (wrong - draws).clamp(min=0)
    log = torch.lgamma(wrong + 1) - torch.lgamma(left + 1)
    log = log + torch.lgamma((wrong + right - draws).clamp(min=0) + 1) - torch.lgamma(wrong + right + 1)
    return torch.where(possible, log.exp(), torch.zeros_like(log))
