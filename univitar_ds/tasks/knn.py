"""Nearest neighbours: an item gets the class with the most votes of its k nearest items of the training split.

As in DINO (arXiv:2104.14294): neighbours by cosine of the pooled features, and votes with weight exp(cosine / 0.07).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.evaluation.scores import CELLS, Figure, chunks
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
    train, test = (F.normalize(features.double(), dim=-1) for features in (data.train, data.test))
    found = []
    for rows in chunks(len(test), max(len(train), CELLS // 1024)):
        near = (test[rows] @ train.T).topk(neighbours, dim=1)
        weights = torch.softmax(near.values / TEMPERATURE, dim=1)
        votes = torch.zeros(len(rows), len(data.classes), dtype=torch.float64)
        found.append(votes.scatter_add_(1, data.train_classes[near.indices], weights))
    return torch.cat(found)
