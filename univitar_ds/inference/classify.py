"""Classifies files by names of classes, or by the trained head of a run: the command `univitar-ds classify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from univitar_ds.classes import ClassList
from univitar_ds.errors import ConfigError
from univitar_ds.formats.stored_model import StoredModel
from univitar_ds.formats.weight_files import some
from univitar_ds.inference.embed_files import ModelOptions, open_for_files
from univitar_ds.inference.model import TEMPLATES, UniViTARModel
from univitar_ds.inference.reading import Kind, LeftOut, read_units
from univitar_ds.inference.sources import Position, find_places, units
from univitar_ds.inference.trained_head import classifies, trained_head
from univitar_ds.inference.workers import device_of, open_placed
from univitar_ds.model.placement import feature_dtype, placed
from univitar_ds.preprocessing import Preprocessor

_AT_ONCE = 32
"""Number of files whose results are printed together."""


class Guess(NamedTuple):
    """A class with its probability among the classes of its data set; `set` is the name of the data set, or None."""

    label: str
    probability: float
    set: str | None = None


@dataclass(frozen=True)
class Classified:
    """The result for a file: the best classes of each data set, or the reason why the file is left out."""

    file: str
    classes: Sequence[Guess] = ()
    fault: LeftOut | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the result as a JSON object."""
        if self.fault is not None:
            return {"file": self.file, "ok": False, "error": self.fault.kind, "message": self.fault.message}
        classes = [{name: value for name, value in one._asdict().items() if value is not None} for one in self.classes]
        return {"file": self.file, "ok": True, "classes": classes}


class Classifier:
    """A model with classes. It runs on the GPU if there is one."""

    def __init__(
        self,
        model: str,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        how: ModelOptions | None = None,
    ) -> None:
        """Opens the model.

        Args: labels: at least two names, for a model with a text tower; None: the classes of a run of `objective.kind:
            classification`, with its trained head; templates: sentences for `labels`, None: `TEMPLATES`.
        Raises: CheckpointError if the model cannot be opened; ConfigError if labels are given and it has no text tower,
            if no labels are given and it has no trained head, or if labels are fewer than two or repeated; UserError if
            a template has no {}.
        """
        _check_labels(labels, templates)
        how = how or ModelOptions()
        opened = open_for_files(model, how)
        device = device_of(0)
        self._reading = opened.setup.reading
        if classifies(opened.stored):
            module, self._classes = trained_head(opened.stored, how.weights, how.dtype)
            if labels is not None:
                raise ConfigError(
                    f"{model} has no text tower, but a trained head for {len(self._classes)} classes "
                    f"({some(list(chain(*self._classes.names.values())))}); leave --labels out"
                )
            self._kind: Kind = "logits"
            dtype = feature_dtype(device) if how.dtype is None else None
            module = placed(module, device, dtype)
            self._model = UniViTARModel(module, Preprocessor(opened.stored.encoder), classes=self._classes)
            return
        _check_whole(model, opened.stored, labels)
        self._kind, self._classes = "embedding", ClassList({None: labels})
        self._model = open_placed(opened.stored, 0, how.dtype)
        self._texts = self._model.encode_classes(labels, templates or TEMPLATES)

    @property
    def sets(self) -> list[str | None]:
        """The names of the data sets that the classes are from; [None] for given labels."""
        return list(self._classes.names)

    def classify(self, files: Sequence[str], top: int) -> Iterator[Classified]:
        """Yields the result of each file in order, with the `top` best classes of each data set.

        For a folder, all images and videos in it are classified.
        Raises: ConfigError if a file does not exist, or a folder has no images and videos."""
        places = find_places(files, shards=False)
        total = sum(map(len, places))
        found = read_units(self._model, self._kind, units(places, total, _AT_ONCE, Position(), 0), self._reading)
        with closing(found):
            for rows in found:
                best = dict(zip(rows.keys, self._best(torch.from_numpy(rows.values), top), strict=True))
                faults = {one.key: one for one in rows.left_out}
                for file in rows.unit.files:
                    yield Classified(file, best.get(file, ()), faults.get(file))

    def _best(self, values: Tensor, top: int) -> list[list[Guess]]:
        """Returns the best classes of each item. Args: values: (N, E) embeddings, or (N, C) logits of the head."""
        found: list[list[Guess]] = [[] for _ in values]
        for name, (begin, end) in self._classes.spans.items():
            if self._kind == "logits":
                probabilities = values[:, begin:end].softmax(dim=1)
            else:
                probabilities = self._model.class_probabilities(values.to(self._model.device), self._texts).cpu()
            best, indices = probabilities.topk(min(top, end - begin), dim=1)
            for guesses, row, places in zip(found, best.tolist(), indices.tolist(), strict=True):
                labels = [self._classes.names[name][place] for place in places]
                guesses += [Guess(label, value, name) for label, value in zip(labels, row, strict=True)]
        return found


def _check_labels(labels: Sequence[str] | None, templates: Sequence[str] | None) -> None:
    """Checks that labels are at least two different names, and that templates come with labels. Raises: ConfigError."""
    if labels is None and templates is not None:
        raise ConfigError("--templates are sentences for the names in --labels; give both")
    if labels is not None and (len(set(labels)) < max(2, len(labels)) or "" in labels):
        raise ConfigError(f"--labels must be at least two different names, as in cat,dog; got {','.join(labels)!r}")


def _check_whole(model: str, stored: StoredModel, labels: Sequence[str] | None) -> None:
    """Checks that a model without a trained head has a text tower, and that there are labels. Raises: ConfigError."""
    if stored.joint is None:
        raise ConfigError(
            f"{model} is an encoder alone, without a text tower and without a trained head; name a run, or a folder "
            "with the whole model"
        )
    if labels is None:
        raise ConfigError(
            f"{model} compares images with class names: give them, as in --labels cat,dog. Only a run of "
            "objective.kind: classification has classes of its own"
        )


def listed(files: Sequence[str]) -> list[str]:
    """Returns the files that `Classifier.classify` reads, in order. Raises: ConfigError for a folder without any."""
    return [file for place in find_places(files, shards=False) for file in place]
