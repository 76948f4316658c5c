"""Results with their chance levels, and ranks of similarity scores with ties.

Scores that differ by at most `TIE` are tied. The result is the expectation over random orders of tied scores. Therefore
a model with one embedding for all items gets exactly the chance level, and the order of the data has no effect. This
is why top-k accuracy and R@k are not computed by scikit-learn or torchmetrics, which order tied candidates by index;
without ties they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES = 1000
"""Number of resamples of a bootstrap interval."""
DRAWN_ROWS = 1 << 16
"""Number of rows that are drawn at a time, of one or more resamples. It limits memory; results do not depend on it."""
TIE = 1e-6
"""Maximum difference of tied scores: above the rounding error of a cosine of float32 vectors."""
CHUNK, CELLS = 1024, 1 << 26
"""Maximum number of queries, and of scores, in a chunk. They limit memory to about 1.7 GB; results do not depend on
them."""


@dataclass(frozen=True)
class Figure:
    """One result: `value` and its `chance` level, in 0..1.

    `task`: such as "zero-shot"; `measure`: such as "top-1" or "R@5"; `modality`: image or video; `n`: number of
    queries, such as items to classify; `candidates`: number of possible answers to each, such as classes; `set`: name
    of the data set, None if the data does not name it.
    """

    task: str
    measure: str
    modality: str
    value: float
    chance: float
    n: int
    candidates: int
    set: str | None = None
    interval: tuple[float, float] | None = None
    """The 95 % interval of `value`, see `bootstrap_interval`; None in results of earlier versions."""

    def to_dict(self) -> dict[str, object]:
        """Returns the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def bootstrap_interval(hits: Tensor, classes: Tensor | None = None) -> tuple[float, float]:
    """Returns the 95 % percentile interval of the mean of `hits` by bootstrap: queries are drawn with replacement.

    It is the uncertainty from the choice of the queries, not of the training. Repeated calls return equal numbers.

    Args: hits: (n,) in 0..1; classes: None, or the (n,) class of each query: then the mean of each class is computed
        first, and the result is the mean over classes.
    """
    values = hits.double().numpy()
    if classes is None:
        ends = percentile_interval(np.mean, values)
    else:
        ends = percentile_interval(_means_of_classes, values, classes.numpy())
    return float(ends[0]), float(ends[1])


def percentile_interval(statistic: Callable[..., np.ndarray], *data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns both ends of the 95 % percentile interval of a statistic by scipy's bootstrap, the same in each call.

    Args: statistic: takes b resamples of each of `data`, (b, n), and `axis`, which is -1; returns (..., b); data: (n,)
        each, of which the same rows are drawn, with replacement.
    """
    from scipy.stats import bootstrap  # its import takes more time than most commands

    n = len(data[0])
    if n == 1:  # all resamples are equal, which scipy refuses
        only = statistic(*(one[None] for one in data), axis=-1)[..., 0]
        return only, only
    found = bootstrap(
        data, statistic, paired=len(data) > 1, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        batch=max(1, DRAWN_ROWS // n), rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.low, found.high


def _means_of_classes(hits: np.ndarray, classes: np.ndarray, axis: int) -> np.ndarray:
    """Returns the mean over classes of the mean of each class, (b,). Args: hits, classes: (b, n)."""
    means = []
    for values, of_class in zip(hits, classes, strict=True):
        counts, sums = np.bincount(of_class), np.bincount(of_class, weights=values)
        means.append((sums[counts > 0] / counts[counts > 0]).mean())
    return np.array(means)


def chunks(queries: int, candidates: int) -> tuple[Tensor, ...]:
    """Returns the indices 0 to `queries` - 1, split into chunks of at most `CHUNK` queries and `CELLS` scores."""
    return torch.arange(queries).split(max(1, min(CHUNK, CELLS // max(candidates, 1))))


def hit_at(k: int, better: Tensor, tied: Tensor, right: Tensor) -> Tensor:
    """Returns the probability that one of the first `k` results is right, over random orders of tied scores.

    Args, each (n,) integer: better: wrong candidates with a higher score than the best right candidate; tied: wrong
        candidates tied with it; right: right candidates tied with it, itself included.
    Returns: (n,) float64.
    """
    free = (k - better).clamp(min=0)
    return 1 - _none_drawn(free, tied, right)


def chance_at(k: int, right: int, candidates: int) -> float:
    """Returns the probability that one of `right` right candidates is among the first `k` in a random order."""
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k) if k < candidates else 1.0


def rank_counts(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the arguments `better`, `tied` and `right` of `hit_at`, each (n,).

    A right candidate with the score NaN ranks last, and a wrong one first.

    Args: scores: (n, m); is_right: (n, m) mask of the right candidates, at least one per row.
    """
    assert bool(is_right.any(dim=1).all()), "a query without a right answer cannot be scored"
    # Otherwise a model with NaN weights would always be right, since no score compares as better.
    last = torch.where(is_right, -torch.inf, torch.inf).to(scores.dtype)
    scores = torch.where(scores.isnan(), last, scores)
    best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
    near = (scores - best).abs() <= TIE
    better = (scores > best) & ~near & ~is_right
    return better.sum(1), (near & ~is_right).sum(1), (near & is_right).sum(1)


def _none_drawn(draws: Tensor, wrong: Tensor, right: Tensor) -> Tensor:
    """Returns the (n,) probability that `draws` draws without replacement from `wrong` + `right` are all wrong."""
    draws, wrong, right = draws.double(), wrong.double(), right.double()
    possible = draws <= wrong
    left = (wrong - draws).clamp(min=0)
    log = torch.lgamma(wrong + 1) - torch.lgamma(left + 1)
    log = log + torch.lgamma((wrong + right - draws).clamp(min=0) + 1) - torch.lgamma(wrong + right + 1)
    return torch.where(possible, log.exp(), torch.zeros_like(log))


def accuracies(
    truth: Tensor, hits: Mapping[int, Tensor], task: str, modality: str, classes: int, name: str | None = None
) -> list[Figure]:
    """Returns top-k accuracy for each k of `hits` below `classes`, and the mean of the top-1 accuracies of the classes.

    The latter is scikit-learn's `balanced_accuracy_score`, which takes classes, not probabilities of a hit.

    Args: truth: (n,) class index of each item; hits: maps each k, 1 included, to the (n,) probabilities that the class
        of an item is among the first k; classes: number of classes; name: name of the data set.
    """
    n = len(truth)

    def figure(measure: str, value: Tensor, k: int, interval: tuple[float, float]) -> Figure:
        return Figure(task, measure, modality, value.item(), chance_at(k, 1, classes), n, classes, name, interval)

    figures = [figure(f"top-{k}", hit.mean(), k, bootstrap_interval(hit)) for k, hit in hits.items() if k < classes]
    present = torch.bincount(truth)
    per_class = torch.bincount(truth, hits[1])[present > 0] / present[present > 0]
    return [*figures, figure("top-1, mean of classes", per_class.mean(), 1, bootstrap_interval(hits[1], truth))]
