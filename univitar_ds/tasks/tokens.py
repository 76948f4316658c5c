"""Measures how the accuracy of kNN or zero-shot depends on the number of tokens per item, in two views of each item.

In the square view an item is stretched to the square of whole cells (squares of merged patches) that is nearest to the
number. In the native view it keeps its aspect ratio and is as large as possible with at most the tokens of that square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from univitar_ds.config.data import SourceConfig
from univitar_ds.errors import ConfigError
from univitar_ds.evaluation.scores import Figure, bootstrap_interval
from univitar_ds.evaluation.zero_shot import class_vectors
from univitar_ds.geometry import PATCH, TUBELET, Modality, Resolution, smart_resize
from univitar_ds.tasks.knn import class_votes
from univitar_ds.tasks.labelled import Features, Labelled, labelled
from univitar_ds.tasks.models import OpenedModel
from univitar_ds.tasks.packs import embedded, pooled

COUNTS = (64, 144, 256, 576, 1024)
"""Default numbers of tokens: those of square images with sides of 112, 168, 224, 336 and 448 pixels."""
MOST = 1 << 16
"""Maximum number of tokens of an item."""
NEIGHBOURS = 20
"""Number of neighbours of kNN."""
NATIVE, SQUARE = "native", "square"
"""The views of an item."""


@dataclass(frozen=True)
class MostTokens(Resolution):
    """Resizes every item, small ones too, to as many tokens as fit into `max_tokens`, so that accuracy is a function of
    that number."""

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        steps = math.ceil(frames / TUBELET)
        most = self.max_tokens * PATCH * PATCH // steps
        # The item is enlarged first, so that `smart_resize` reduces it: it rounds down only when it reduces.
        grow = math.ceil(math.sqrt(most / (height * width))) + 1
        h, w = smart_resize(height * grow, width * grow, self.divisor_px, 0, most)
        return steps, h // PATCH, w // PATCH


class Point(NamedTuple):
    """The top-1 accuracy `figure` of a modality in one view. `asked`: requested number of tokens per item; `mean`: mean
    number of tokens of the labelled test items."""

    modality: Modality
    view: str
    asked: int
    mean: float
    figure: Figure


def rules(opened: OpenedModel, count: int, steps: int) -> dict[str, Resolution]:
    """Returns the resolutions of both views for a number of tokens.

    The number may be above the encoder's own limit: a native-resolution encoder can be tested beyond its training.
    Args: count: number of tokens; steps: time steps of an item.
    Raises: ConfigError if the number is above `MOST`, or too small for one cell in each time step.
    """
    encoder = opened.reading.encoder
    cell = PATCH * encoder.spatial_merge_size
    side = max(round(math.sqrt(count / steps) * PATCH / cell), 1) * cell
    held = steps * (side // PATCH) ** 2
    least = steps * encoder.spatial_merge_size**2
    if not least <= count <= MOST:
        what = f"a video of {steps * TUBELET} frames" if steps > 1 else "an item"
        raise ConfigError(f"--counts {count}: {what} has {least} to {MOST} tokens; give another number")
    return {NATIVE: MostTokens(least, held, cell), SQUARE: Resolution(least, held, cell, side)}


@dataclass(frozen=True)
class Sweep:
    """Measures accuracy at several numbers of tokens: by kNN if there is a source `train`, else zero-shot with
    `templates`."""

    opened: OpenedModel
    test: SourceConfig
    train: SourceConfig | None
    templates: Sequence[str]
    progress: bool

    def points(self, modality: Modality, counts: Sequence[int]) -> tuple[list[Point], list[str]]:
        """Returns a point for each number and view, and sentences about them. Both are empty if no item has a label.

        Raises: ConfigError as `rules`, before anything is computed; DataError as `labelled`.
        """
        steps = self.opened.reading.frames // TUBELET if modality == "video" else 1
        found: list[Point] = []
        notes: list[str] = []
        for count, both in {count: rules(self.opened, count, steps) for count in sorted(set(counts))}.items():
            right: dict[str, Tensor] = {}
            for view, rule in both.items():
                measured = self._measured(modality, rule)
                if measured is None:
                    return [], []
                data, scores, mean = measured
                task = f"{'kNN' if self.train else 'zero-shot'} ({count} tokens, {view})"
                found.append(Point(modality, view, count, mean, data.accuracies(scores, task, modality)[0]))
                right[view] = (scores.argmax(1) == data.test_classes).double()
            notes.append(_difference(modality, count, right, [point.mean for point in found[-2:]]))
        most = self.opened.reading.encoder.max_tokens
        if beyond := [count for count in counts if count > most]:
            notes.append(f"Items of {min(beyond)} or more tokens exceed the encoder's max_tokens {most}.")
        return found, notes

    def _measured(self, modality: Modality, rule: Resolution) -> tuple[Labelled, Tensor, float] | None:
        """Returns the items, the score of each class for each test item (n, classes) float64, and the mean number of
        tokens of a test item; None if no item has a label."""
        test, mean = self._features(self.test, modality, rule)
        train = test if self.train is None else self._features(self.train, modality, rule)[0]
        if not train.labels and not test.labels:
            return None
        data = labelled(train, test, modality)
        if self.train is not None:
            return data, class_votes(data, min(NEIGHBOURS, len(data.train))), mean
        classes = class_vectors(data.classes, self.templates, self.opened.texts)
        return data, data.test.double() @ classes.double().T, mean

    def _features(self, source: SourceConfig, modality: Modality, rule: Resolution) -> tuple[Features, float]:
        """Returns joint embeddings (zero-shot) or pooled features (kNN), and the mean number of tokens."""
        read = embedded if self.train is None else pooled
        packs = list(read(self.opened, source, modality, rule, progress=self.progress))
        labels = [label for pack in packs for label in pack.labels]
        values = torch.cat([pack.values for pack in packs]) if packs else torch.empty(0, 0)
        return Features(values, labels), sum(sum(pack.lengths) for pack in packs) / max(len(labels), 1)


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
