"""Mean intersection over union of semantic segmentation, from counts of pixels for each image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from univitar_ds.evaluation.scores import RESAMPLES


def counted(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the numbers of pixels of an image by class: right, predicted and labelled, (3, classes) float64.

    Args: predicted, labels: (H, W) integers; pixels whose label is negative are left out.
    """
    known = labels >= 0
    guess, truth = predicted[known].long(), labels[known].long()
    parts = (truth[guess == truth], guess, truth)
    return torch.stack([torch.bincount(part.flatten(), minlength=classes) for part in parts]).double()


def mean_iou(counts: Tensor) -> Tensor:
    """Returns the mean over classes of right / (predicted + labelled - right), without classes that do not occur.

    Args: counts: (..., 3, classes), sums of `counted`. Returns: (...).
    """
    right, predicted, labelled = counts.unbind(-2)
    union = predicted + labelled - right
    return torch.where(union > 0, right / union, torch.nan).nanmean(-1)


def accuracy(counts: Tensor) -> Tensor:
    """Returns the share of labelled pixels whose class is predicted. Args, returns: as `mean_iou`."""
    return counts[..., 0, :].sum(-1) / counts[..., 2, :].sum(-1)


def constant(counts: Tensor, place: int) -> Tensor:
    """Returns the counts of always predicting one class. Args: counts: (3, classes); place: index of the class."""
    found = torch.zeros_like(counts)
    found[2] = counts[2]
    found[0, place], found[1, place] = counts[2, place], counts[2].sum()
    return found


def intervals(images: Tensor) -> list[tuple[float, float]]:
    """Returns the 95 % percentile intervals of `mean_iou` and `accuracy` by bootstrap: images are drawn with
    replacement. Repeated calls return equal numbers. Args: images: (n, 3, classes)."""
    draws = np.random.default_rng(0)
    n = len(images)
    values: tuple[list[float], list[float]] = ([], [])
    for _ in range(RESAMPLES):
        times = torch.from_numpy(np.bincount(draws.integers(n, size=n), minlength=n)).double()
        counts = torch.einsum("n,nkc->kc", times, images)
        for one, measure in zip(values, (mean_iou, accuracy), strict=True):
            one.append(measure(counts).item())
    return [(float(low), float(high)) for low, high in (np.percentile(one, [2.5, 97.5]) for one in values)]
