"""Nearest neighbours: an item gets the class with the most votes of its k nearest items of the training split.

As in DINO (arXiv:2104.14294): neighbours by cosine of the pooled features, and votes with weight exp(cosine / 0.07).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.evaluation.scores import Figure
from univitar_ds.tasks.labelled import Labelled

NEIGHBOURS = (10, 20)
"""Default numbers of neighbours, both published: 20 is DINO's best for ViT; 10 is best if classes have few items."""
TEMPERATURE = 0.07
"""Temperature of the votes in DINO."""


def knn(data: Labelled, modality: str, neighbours: Sequence[int] = NEIGHBOURS) -> list[Figure]:
    """Returns top-1 and top-5 accuracy for each of `neighbours`, limited to the number of training items."""
    figures: list[Figure] = []
    for count in sorted({min(one, len(data.train)) for one in neighbours}):
        # Classes without a vote are tied behind all others.
        figures += data.accuracies(class_votes(data, count), f"kNN, k = {count}", modality)
    return figures


def class_votes(data: Labelled, neighbours: int) -> Tensor:
    """Returns the share of the votes that each class has for each test item, (n, classes) float64."""
    from sklearn.neighbors import KNeighborsClassifier  # its import takes more time than most commands

    train, test = (F.normalize(features.double(), dim=-1).numpy() for features in (data.train, data.test))
    # Of unit vectors the distance gives the cosine. scikit-learn's metric "cosine" takes 4 times as long.
    model = KNeighborsClassifier(neighbours, weights=_weights, algorithm="brute")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes of one item are no mistake here
        model.fit(train, data.train_classes.numpy())
    return torch.from_numpy(model.predict_proba(test))


def _weights(distances: np.ndarray) -> np.ndarray:
    """Returns the weights of votes. Args: distances: of unit vectors."""
    return np.exp((1 - distances**2 / 2) / TEMPERATURE)
