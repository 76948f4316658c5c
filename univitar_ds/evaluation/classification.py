"""Accuracy of a classification run's head on held-out items, set by set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from univitar_ds.classes import ClassList
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation.measure import VERIFY_HINT
from univitar_ds.evaluation.scores import Figure, accuracies, hit_at, rank_counts
from univitar_ds.evaluation.zero_shot import KS
from univitar_ds.geometry import Modality
from univitar_ds.model.classification import ClassificationModel, class_logits
from univitar_ds.screen import progress_bar


@dataclass(frozen=True)
class Hits:
    """Classified items of a model, by data set.

    `truth`: the right class of each item, as an index into the classes of its set, (n,) int64; `among`: the probability
    that the right class is among the first k, (len(KS), n) float64; `left`: number of items that were left out, by
    reason.
    """

    truth: dict[str | None, Tensor]
    among: dict[str | None, Tensor]
    left: Counter[str]


def measure_classes(
    model: ClassificationModel, classes: ClassList, packs: Iterable[PackedBatch], modality: Modality, *, progress: bool
) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of each data set, top-1 averaged over its classes, and notes.

    The candidates of an item are the classes of its set, as in training; `chance` is the accuracy of a random order of
    them. A k of at least the number of classes is left out. A note counts the items without a label of `classes`.
    """
    return class_figures(class_hits([model], classes, packs, modality, progress=progress)[0], classes, modality)


def class_hits(
    models: Sequence[ClassificationModel],
    classes: ClassList,
    packs: Iterable[PackedBatch],
    modality: Modality,
    *,
    progress: bool,
) -> list[Hits]:
    """Classifies all packs by each of several models of one shape on one device. Returns the hits of each model."""
    device = next(models[0].parameters()).device
    hits: list[dict[str | None, list[tuple[Tensor, Tensor]]]] = [{} for _ in models]
    left: Counter[str] = Counter()
    with progress_bar(desc=f"classifying {modality}s", unit=modality, disable=not progress) as bar:
        for pack in packs:
            left.update(pack.bad)
            left.update(pack.filtered)
            rows = [classes.row(name, label) for name, label in zip(pack.sets, pack.labels, strict=True)]
            left["without a label that the run has learned"] += rows.count(None)
            if any(row is not None for row in rows):
                pixels = pack.pixels.to(device)
                for model, found in zip(models, hits, strict=True):
                    logits = class_logits(model, pixels, pack.frames, pack.grid_thw).cpu()
                    for name in dict.fromkeys(pack.sets):
                        some = [at for at, row in enumerate(rows) if row is not None and pack.sets[at] == name]
                        if some:
                            own = _hits(logits[some], [rows[at] for at in some], classes, name)
                            found.setdefault(name, []).append(own)
            bar.update(len(pack))
    return [
        Hits(
            {name: torch.cat([one for one, _ in parts]) for name, parts in found.items()},
            {name: torch.cat([one for _, one in parts], dim=1) for name, parts in found.items()},
            left,
        )
        for found in hits
    ]


def class_figures(hits: Hits, classes: ClassList, modality: Modality) -> tuple[list[Figure], list[str]]:
    """Returns the figures of `hits`, and notes, as `measure_classes`."""
    found = [name for name in classes.names if name in hits.truth]
    figures = [one for name in found for one in _figures(hits, len(classes.names[name]), name, modality)]
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(hits.left.items()) if count)
    return figures, [f"Some {modality}s were left out: {counted}; {VERIFY_HINT}."] if counted else []


def _hits(logits: Tensor, rows: list[int], classes: ClassList, name: str | None) -> tuple[Tensor, Tensor]:
    """Returns the right class of each item within its set, (n,), and the probability that it is among the first k,
    (len(KS), n)."""
    begin, end = classes.spans[name]
    truth = torch.tensor(rows) - begin
    counts = rank_counts(logits[:, begin:end].double(), truth[:, None] == torch.arange(end - begin))
    return truth, torch.stack([hit_at(k, *counts) for k in KS])


def _figures(hits: Hits, among: int, name: str | None, modality: Modality) -> list[Figure]:
    by_k = dict(zip(KS, hits.among[name], strict=True))
    return accuracies(hits.truth[name], by_k, "classification", modality, among, name)
