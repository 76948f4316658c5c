"""Mean intersection over union (IoU) and pixel accuracy of semantic segmentation, from pixel counts of each image."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from univitar_ds.evaluation.scores import percentile_interval


def counted(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns three pixel counts for each class of an image, (3, classes) float64.

    These are the pixels of the class that are predicted correctly, all pixels predicted as the class, and all pixels
    labelled with it.

    Args: predicted, labels: (H, W) class indices below 2^15; pixels with a negative label are not counted, one at least
        has another.
    """
    from sklearn.metrics import confusion_matrix  # its import takes more time than most commands

    known = labels >= 0
    guess, truth = (one[known].to(torch.int16).numpy() for one in (predicted, labels))  # faster there than int64
    table = confusion_matrix(truth, guess, labels=np.arange(classes))
    return torch.from_numpy(np.stack([table.diagonal(), table.sum(0), table.sum(1)])).double()


def mean_iou(counts: Tensor) -> Tensor:
    """Returns the mean over classes of the IoU, right / (predicted + labelled - right).

    Classes that are neither predicted nor labelled are left out. It equals scikit-learn's `jaccard_score`, which takes
    the pixels of all images at once, and once for each resample.

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
    flat = images.flatten(1).numpy()

    def measured(rows: np.ndarray, axis: int) -> np.ndarray:
        repeats = np.stack([np.bincount(drawn, minlength=len(flat)) for drawn in rows])
        counts = torch.from_numpy(repeats @ flat).unflatten(1, images.shape[1:])
        return np.stack([measure(counts).numpy() for measure in (mean_iou, accuracy)])

    low, high = percentile_interval(measured, np.arange(len(flat)))
    return list(zip(low.tolist(), high.tolist(), strict=True))
