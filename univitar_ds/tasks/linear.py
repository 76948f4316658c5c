"""Linear probe: multinomial logistic regression on the pooled features, with scikit-learn's L-BFGS.

The strength of the L2 penalty is chosen on a fifth of the training items, as in CLIP (arXiv:2103.00020, A.3); then the
probe is trained on all of them. The test items are never used for a choice.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from univitar_ds.evaluation.scores import Figure
from univitar_ds.screen import progress_bar
from univitar_ds.tasks.labelled import Labelled, divided

STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""Values of scikit-learn's C that are compared, for features of mean 0 and variance 1: our choice."""
MOST_ITERATIONS = 1000

logger = logging.getLogger(__name__)


def linear(data: Labelled, modality: str, *, progress: bool) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of the probe, and a note about the chosen strength."""
    train, test = _standardised(data.train, data.test)
    learns, checks = divided(data.train_classes)
    best, held_out = _chosen(train, data.train_classes, learns, checks, progress)
    probe = _fitted(train, data.train_classes, best)
    scores = _scores(probe, test, len(data.classes))
    figures = data.accuracies(scores, "linear probe", modality)
    if not len(checks):
        return figures, [f"Linear probe of {modality}s: C = {best:g}, since no item is held out to choose it."]
    note = f"Linear probe of {modality}s: C = {best:g} of {STRENGTHS[0]:g} to {STRENGTHS[-1]:g}"
    return figures, [f"{note}, with top-1 {100 * held_out:.1f} % on {len(checks)} training items held out."]


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with mean 0 and variance 1 in each dimension of the training items."""
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0).clamp(min=1e-6)
    return (train.double() - mean) / deviation, (test.double() - mean) / deviation


def _chosen(train: Tensor, classes: Tensor, learns: Tensor, checks: Tensor, progress: bool) -> tuple[float, float]:
    """Returns the best strength and its top-1 on the held-out items; the smallest of equally good strengths.

    Without held-out items they are 1 and NaN."""
    if not len(checks):  # every class has one item
        return 1.0, float("nan")
    results: dict[float, float] = {}
    learned, held_out, right = train[learns], train[checks].numpy(), classes[checks].numpy()
    with progress_bar(total=len(STRENGTHS), desc="linear probe", unit="fit", disable=not progress) as bar:
        for strength in STRENGTHS:
            results[strength] = float(_fitted(learned, classes[learns], strength).score(held_out, right))
            bar.update()
    best = max(results, key=lambda strength: (results[strength], -strength))
    return best, results[best]


def _fitted(features: Tensor, classes: Tensor, strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning  # its import takes more time than most commands
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        probe = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS).fit(features.numpy(), classes.numpy())
    if any(issubclass(one.category, ConvergenceWarning) for one in caught):
        logger.warning("the probe with C = %g has not converged after %d iterations", strength, MOST_ITERATIONS)
    return probe


def _scores(probe: Any, features: Tensor, classes: int) -> Tensor:
    """Returns the log-probability of each class, (n, classes) float64."""
    scores = torch.full((len(features), classes), -torch.inf, dtype=torch.float64)
    scores[:, torch.as_tensor(probe.classes_)] = torch.as_tensor(probe.predict_log_proba(features.numpy()))
    return scores
