"""Zero-shot classification of files: the command `univitar-ds classify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from univitar_ds.errors import ConfigError
from univitar_ds.inference.embed_files import ModelOptions, open_for_files
from univitar_ds.inference.model import TEMPLATES, UniViTARModel
from univitar_ds.inference.reading import LeftOut, read_units
from univitar_ds.inference.sources import Position, find_places, units
from univitar_ds.training.distributed.process_group import uses_cuda

_AT_ONCE = 32
"""Number of files whose results are printed together."""


@dataclass(frozen=True)
class Classified:
    """The result for a file: its best classes with their probabilities, or why it is left out."""

    file: str
    classes: Sequence[tuple[str, float]] = ()
    fault: LeftOut | None = None

    def to_json(self) -> dict[str, Any]:
        if self.fault is not None:
            return {"file": self.file, "ok": False, "error": self.fault.kind, "message": self.fault.message}
        classes = [{"label": label, "probability": probability} for label, probability in self.classes]
        return {"file": self.file, "ok": True, "classes": classes}


class Classifier:
    """A model with classes. Runs on the GPU if there is one."""

    def __init__(
        self,
        model: str,
        labels: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        how: ModelOptions | None = None,
    ) -> None:
        """Raises: CheckpointError if the model cannot be opened; ConfigError if it is an encoder alone, or the labels
        are empty or repeated; UserError if a template has no {}."""
        if not labels or len(set(labels)) < len(labels) or "" in labels:
            raise ConfigError(f"--labels must be different names, separated by commas, got {','.join(labels)!r}")
        opened = open_for_files(model, how or ModelOptions())
        if opened.stored.joint is None:
            raise ConfigError(
                f"{model} is an encoder alone, which has no text tower; name a run, or a folder with the whole model"
            )
        self.labels = labels
        self._reading = opened.setup.reading
        self._model = UniViTARModel.of(opened.stored).to("cuda" if uses_cuda() else "cpu")
        self._classes = self._model.encode_classes(labels, templates)

    def classify(self, files: Sequence[str], top: int) -> Iterator[Classified]:
        """Yields the result of each file in order, with the `top` best classes. Folders count as the files in them."""
        places = find_places(files, shards=False)
        total = sum(map(len, places))
        found = read_units(self._model, "embedding", units(places, total, _AT_ONCE, Position(), 0), self._reading)
        with closing(found):
            for rows in found:
                embeddings = torch.from_numpy(rows.values).to(self._model.device)
                probabilities = self._model.class_probabilities(embeddings, self._classes).cpu()
                values, indices = probabilities.topk(min(top, len(self.labels)), dim=1)
                best = {
                    key: [(self.labels[index], value) for value, index in zip(*row, strict=True)]
                    for key, *row in zip(rows.keys, values.tolist(), indices.tolist(), strict=True)
                }
                faults = {one.key: one for one in rows.left_out}
                for file in rows.unit.files:
                    yield Classified(file, best.get(file, ()), faults.get(file))


def listed(files: Sequence[str]) -> list[str]:
    """Returns the files that `Classifier.classify` reads, in order. Raises: ConfigError for a folder without any."""
    return [file for place in find_places(files, shards=False) for file in place]
