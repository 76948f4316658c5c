"""The items that a probe is trained on and those that it is scored on, with their classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from univitar_ds.errors import DataError
from univitar_ds.evaluation.scores import Figure, accuracies, chunks, hit_at, rank_counts
from univitar_ds.formats.weight_files import some
from univitar_ds.tasks.cached.feature_cache import Vectors
from univitar_ds.tasks.items import Items

KS = (1, 5)
"""Values of k for which top-k accuracy is computed."""
HELD_OUT = 0.2
"""Share of the training items on which the regularization or the learning rate of a probe is chosen."""


@dataclass(frozen=True)
class Features:
    """Features of the n items of one modality that have a label: (n, D) float32 on the host."""

    values: Tensor
    labels: list[str]


def labelled_features(items: Items, found: Vectors) -> Features:
    """Returns the features of the items that have a label."""
    samples, values, _ = items.with_features(found)
    some = [row for row, sample in enumerate(samples) if sample.label is not None]
    return Features(values[some], [samples[row].label for row in some])


@dataclass(frozen=True)
class Labelled:
    """Features (n, D) float32 and class indices (n,) of both splits. `classes` are the labels of the training split.

    `unknown` counts test items whose label the training split lacks. They are left out, since no probe can be right.
    """

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor
    classes: list[str]
    unknown: int = 0

    def accuracies(self, scores: Tensor, task: str, modality: str) -> list[Figure]:
        """Returns the results of a probe. Args: scores: of each class for each test item, (n, classes) float64."""
        columns, hits = torch.arange(len(self.classes)), torch.empty(len(KS), len(scores), dtype=torch.float64)
        for rows in chunks(*scores.shape):
            counts = rank_counts(scores[rows], self.test_classes[rows, None] == columns)
            for of_k, k in zip(hits, KS, strict=True):
                of_k[rows] = hit_at(k, *counts)
        return accuracies(self.test_classes, dict(zip(KS, hits, strict=True)), task, modality, len(self.classes))


def labelled(train: Features, test: Features, kind: str, names: Sequence[str] = ()) -> Labelled:
    """Returns both splits with class indices.

    Args: kind: modality of the items; names: classes that need not occur, for zero-shot.
    Raises: DataError as `common_classes`.
    """
    classes = common_classes([*names, *train.labels], test.labels, kind)
    index_of = {label: index for index, label in enumerate(classes)}
    known = [row for row, label in enumerate(test.labels) if label in index_of]
    return Labelled(
        train.values,
        torch.tensor([index_of[label] for label in train.labels]),
        test.values[known],
        torch.tensor([index_of[test.labels[row]] for row in known]),
        classes,
        len(test.labels) - len(known),
    )


def common_classes(train: Sequence[str], test: Sequence[str], kind: str) -> list[str]:
    """Returns `class_names` of the training labels.

    Args: train, test: labels of both splits; kind: modality of the items.
    Raises: DataError as `class_names`, or if no test item has one of the classes.
    """
    classes = class_names(train, kind)
    if not set(classes) & set(test):
        raise DataError(
            f"none of the {len(test)} labelled {kind}s of the test split has a label of the training split "
            f"({some(classes)}); name a split of the same classes with --split"
        )
    return classes


def class_names(labels: Sequence[str], kind: str) -> list[str]:
    """Returns the sorted classes of the training items.

    Args: labels: of the training split; kind: modality of the items.
    Raises: DataError for fewer than two classes.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        found = f"only the label {classes[0]!r}" if classes else "no label"
        raise DataError(
            f"the {kind}s of the training split have {found}; a probe needs at least two: name other items with "
            "--train-split or --train-data"
        )
    return classes


def divided(classes: Tensor, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Returns the rows to train on and the held-out rows.

    Of each class with two items or more a share is held out, at least one item.
    Args: classes: (n,) of the training items.
    """
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    held: list[Tensor] = []
    for one in classes.unique():
        rows = order[classes[order] == one]
        held.append(rows[: max(round(share * len(rows)), 1)] if len(rows) > 1 else rows[:0])
    checks = torch.cat(held)
    learns = torch.ones(len(classes), dtype=torch.bool)
    learns[checks] = False
    return learns.nonzero().flatten(), checks
