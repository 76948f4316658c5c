"""Linear probe by stochastic gradient descent with a sweep of learning rates, as in DINOv2 (arXiv:2304.07193).

The heads of all rates are trained at once on the cached features, by SGD with momentum 0.9, no weight decay and a
cosine schedule. The best rate is chosen on a fifth of the training items; then a head is trained with it on all of
them. The test items are never used for a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.evaluation.scores import Figure, chunks
from univitar_ds.tasks.labelled import Labelled, divided
from univitar_ds.tasks.probes.sweep import Recipe, chosen, linear_heads, row_batches, train

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""The learning rates of DINOv2 for a batch of 256; for other batch sizes they are scaled in proportion."""
RECIPE = Recipe("sgd", RATES, batch=1024, epochs=10, least_steps=1000)
"""Batch size and epochs are those of DINOv2. The minimum of 1,000 steps is our choice, for a few thousand items."""
BATCH_OF_RATES = 256
"""Batch size to which RATES refer."""


def linear_sgd(
    data: Labelled, modality: str, *, device: torch.device, epochs: int | None = None, progress: bool = False
) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of the probe, and a note about the chosen learning rate.

    Features stay on the host in float32, and are standardised batch by batch on `device`.
    """
    recipe = RECIPE if epochs is None else replace(RECIPE, epochs=epochs, least_steps=1)
    features = _Standardised(data.train, device)
    learns, checks = divided(data.train_classes)
    heads = _trained(features, data, learns, recipe, recipe.rates, "all rates" if progress else None)
    held_out = _accuracies(heads, features, data.train_classes, checks)
    place, said = chosen(recipe.rates, held_out, "top-1", f"{len(checks)} training items held out")
    rate, every = recipe.rates[place : place + 1], torch.arange(len(data.train))
    (head,) = _trained(features, data, every, recipe, rate, "chosen rate" if progress else None)
    rows = chunks(len(data.test), len(data.classes))
    with torch.no_grad():
        scores = torch.cat([head(features.of(data.test[some])).double().cpu() for some in rows])
    return data.accuracies(scores, "linear probe (SGD)", modality), [f"Linear probe of {modality}s by SGD: {said}"]


class _Standardised:
    """Features with mean 0 and variance 1 in each dimension of the training items."""

    def __init__(self, train: Tensor, device: torch.device) -> None:
        self._train, self.device = train, device
        sums, squares = torch.zeros(2, train.shape[1], dtype=torch.float64)
        for rows in train.split(1 << 14):  # a copy of all features in float64 would take twice their memory
            sums += rows.double().sum(0)
        mean = sums / len(train)
        for rows in train.split(1 << 14):
            squares += (rows.double() - mean).square().sum(0)
        deviation = (squares / len(train)).sqrt().clamp(min=1e-6)
        self._mean, self._deviation = mean.float().to(device), deviation.float().to(device)

    def of(self, features: Tensor) -> Tensor:
        """Returns standardised features on the device. Args: features: (n, D) on the host."""
        return (features.to(self.device) - self._mean) / self._deviation

    def rows(self, rows: Tensor) -> Tensor:
        """Returns the standardised features of some training items, (n, D) on the device."""
        return self.of(self._train[rows])


def _trained(
    features: _Standardised, data: Labelled, learns: Tensor, recipe: Recipe, rates: Sequence[float], desc: str | None
) -> list[nn.Linear]:
    """Returns a head for each rate, trained on the training items `learns`. Args: desc: for the progress bar; None: no
    bar."""
    steps, batch = recipe.plan(len(learns))
    heads = linear_heads(len(rates), data.train.shape[1], len(data.classes), features.device)

    def loss(rows: Tensor) -> Tensor:
        given, classes = features.rows(rows), data.train_classes[rows].to(features.device)
        return torch.stack([F.cross_entropy(head(given), classes) for head in heads])

    batches: Iterable[list[Tensor]] = ([rows] for rows in row_batches(learns, batch))
    scaled = [rate * batch / BATCH_OF_RATES for rate in rates]
    train(heads, scaled, recipe, batches, loss, steps=steps, progress=desc and f"linear probe, {desc}")
    return heads


@torch.no_grad()
def _accuracies(heads: Sequence[nn.Linear], features: _Standardised, classes: Tensor, checks: Tensor) -> list[float]:
    """Returns the top-1 accuracy of each head on the held-out items; NaN without any, and for a head that diverged."""
    if not len(checks):
        return [float("nan")] * len(heads)
    # Not scikit-learn's: rows are counted batch by batch, on the device, for all heads.
    hits = torch.zeros(len(heads), dtype=torch.float64)
    for rows in checks.split(1 << 14):
        given, right = features.rows(rows), classes[rows]
        for place, head in enumerate(heads):
            hits[place] += (head(given).argmax(1).cpu() == right).double().sum()
    finite = torch.tensor([bool(head.weight.isfinite().all()) for head in heads])
    return torch.where(finite, hits / len(checks), float("nan")).tolist()
