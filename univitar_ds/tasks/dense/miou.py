"""Mean intersection over union (IoU) and pixel accuracy of semantic segmentation, from pixel counts of each image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from univitar_ds.evaluation.scores import RESAMPLES


def counted(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns three pixel counts for each class of an image, (3, classes) float64.

    These are the pixels of the class that are predicted correctly, all pixels predicted as the class, and all pixels
    labelled with it.

    Args: predicted, labels: (H, W) class indices as integers; pixels with a negative label are not counted.
    """
    known = labels >= 0
    guess, truth = predicted[known].long(), labels[known].long()
    parts = (truth[guess == truth], guess, truth)
    return torch.stack([torch.bincount(part.flatten(), minlength=classes) for part in parts]).double()


def mean_iou(counts: Tensor) -> Tensor:
    """Returns the mean over classes of the IoU, right / (predicted + labelled - right).

    Classes that are neither predicted nor labelled are left out.

    Args: counts: (..., 3, classes), results of `counted` or their sums. Returns: a tensor of shape (...).
    """
    right, predicted, labelled = counts.unbind(-2)
    union = predicted + labelled - right
    return torch.where(union > 0, right / union, torch.nan).nanmean(-1)


def accuracy(counts: Tensor) -> Tensor:
    """Returns the fraction of labelled pixels that are predicted correctly. Args, returns: as `mean_iou`."""
    return counts[..., 0, :].sum(-1) / counts[..., 2, :].sum(-1)


def constant(counts: Tensor, index: int) -> Tensor:
    """Returns the counts of a model that predicts one class for every pixel, for the labels counted in `counts`.

    Args: counts: (3, classes), as from `counted`; index: of the class.
    """
    found = torch.zeros_like(counts)
    found[2] = counts[2]
    found[0, index], found[1, index] = counts[2, index], counts[2].sum()
    return found


def intervals(images: Tensor) -> list[tuple[float, float]]:
    """Returns the 95 % bootstrap percentile intervals (low, high) of `mean_iou` and `accuracy`.

    Each resample draws n images with replacement. Repeated calls return equal numbers.

    Args: images: (n, 3, classes), `counted` of each image.
    """
    draws = np.random.default_rng(0)
    n = len(images)
    values: tuple[list[float], list[float]] = ([], [])
    for _ in range(RESAMPLES):
        repeats = torch.from_numpy(np.bincount(draws.integers(n, size=n), minlength=n)).double()
        counts = torch.einsum("n,nkc->kc", repeats, images)
        for one, measure in zip(values, (mean_iou, accuracy), strict=True):
            one.append(measure(counts).item())
    return [(float(low), float(high)) for low, high in (np.percentile(one, [2.5, 97.5]) for one in values)]
