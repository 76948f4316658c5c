"""Measures how the accuracy of kNN or zero-shot depends on the number of tokens per item, in two views of each item.

See `sizes` for the views. Features are computed and cached as those of other tasks, for each number and view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from univitar_ds.config.data import SourceConfig
from univitar_ds.evaluation.scores import Figure, bootstrap_interval
from univitar_ds.evaluation.zero_shot import class_vectors
from univitar_ds.geometry import Modality
from univitar_ds.inference.workers import AnySetup
from univitar_ds.tasks.cached.feature_cache import features
from univitar_ds.tasks.items import Items
from univitar_ds.tasks.knn import class_votes
from univitar_ds.tasks.labelled import Features, Labelled, labelled
from univitar_ds.tasks.models import OpenedModel
from univitar_ds.tasks.peers import OpenedPeer
from univitar_ds.tasks.sizes import NATIVE, SQUARE

COUNTS = (64, 144, 256, 576, 1024)
"""Default numbers of tokens: those of squares with sides of 112, 168, 224, 336 and 448 pixels at 14 px a patch."""
NEIGHBOURS = 20
"""Number of neighbours of kNN."""


class Point(NamedTuple):
    """The top-1 accuracy `figure` of a modality in one view. `asked`: requested number of tokens per item; `mean`: mean
    number of tokens of the labelled test items."""

    modality: Modality
    view: str
    asked: int
    mean: float
    figure: Figure


class SweptSplit(NamedTuple):
    """A split of the data: its source, and its items of one modality."""

    source: SourceConfig
    items: Items


@dataclass(frozen=True)
class Sweep:
    """Measures accuracy at several numbers of tokens: by kNN if there is a split `train`, else zero-shot with
    `templates`. `cache`: folder of the features; `names`: classes that need not occur, for zero-shot."""

    opened: OpenedModel | OpenedPeer
    test: SweptSplit
    train: SweptSplit | None
    templates: Sequence[str]
    cache: Path
    progress: bool
    names: Sequence[str] = ()

    def points(self, counts: Sequence[int]) -> tuple[list[Point], list[str]]:
        """Returns a point for each number and view, and sentences about them.

        Raises: ConfigError as `sizes.views`, before anything is computed; DataError as `labelled`.
        """
        modality, texts = self.test.items.modality, self.train is None
        found: list[Point] = []
        notes: list[str] = []
        setups = {count: self.opened.sized(count, modality, texts=texts) for count in sorted(set(counts))}
        for count, both in setups.items():
            right: dict[str, Tensor] = {}
            for view, setup in both.items():
                data, scores, mean = self._measured(setup)
                task = f"{'kNN' if self.train else 'zero-shot'} ({count} tokens, {view})"
                found.append(Point(modality, view, count, mean, data.accuracies(scores, task, modality)[0]))
                right[view] = (scores.argmax(1) == data.test_classes).double()
            notes.append(_difference(modality, count, right, [point.mean for point in found[-2:]]))
        most = self.opened.most_tokens
        if most is not None and (beyond := [count for count in counts if count > most]):
            notes.append(f"Items of {min(beyond)} or more tokens exceed the encoder's max_tokens {most}.")
        return found, notes

    def _measured(self, setup: AnySetup) -> tuple[Labelled, Tensor, float]:
        """Returns the items, the score of each class for each test item (n, classes) float64, and the mean number of
        tokens of a test item."""
        test, mean = self._features(self.test, setup)
        train = test if self.train is None else self._features(self.train, setup)[0]
        data = labelled(train, test, self.test.items.modality, self.names)
        if self.train is not None:
            return data, class_votes(data, min(NEIGHBOURS, len(data.train))), mean
        classes = class_vectors(data.classes, self.templates, self.opened.texts)
        return data, F.normalize(data.test.double(), dim=-1) @ classes.double().T, mean

    def _features(self, split: SweptSplit, setup: AnySetup) -> tuple[Features, float]:
        """Returns joint embeddings (zero-shot) or pooled features (kNN), and the mean number of tokens."""
        found = features(self.opened, setup, split.source, self.cache, progress=self.progress)
        samples, rows, _ = split.items.with_rows(found.keys, found.left_out)
        kept = [(row, sample.label) for row, sample in zip(rows, samples, strict=True) if sample.label is not None]
        rows = [row for row, _ in kept]
        tokens = found.grids[rows].prod(dim=1).double()
        return Features(found.values[rows], [label for _, label in kept]), tokens.mean().item() if kept else 0.0


def _difference(modality: str, count: int, right: dict[str, Tensor], means: Sequence[float]) -> str:
    """Returns a sentence about the difference of native and square on the same items, with its interval.

    Args: right: (n,) by view, 1 for a hit and 0 otherwise; means: mean numbers of tokens, native and square."""
    change = right[NATIVE] - right[SQUARE]
    # `bootstrap_interval` takes values in 0..1, so differences d in -1..1 are passed as (1 + d) / 2 and mapped back.
    low, high = (200 * end - 100 for end in bootstrap_interval((1 + change) / 2))
    return (
        f"{modality}s, {count} tokens: native minus square {100 * change.mean().item():+.1f} points "
        f"on the same items (95 % interval {low:+.1f} to {high:+.1f}), with {means[0]:.0f} and {means[1]:.0f} tokens "
        "on average."
    )
