"""Accuracy of a classification run's head on held-out items, set by set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

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


def measure_classes(
    model: ClassificationModel, classes: ClassList, packs: Iterable[PackedBatch], modality: Modality, *, progress: bool
) -> tuple[list[Figure], list[str]]:
    """Returns top-1 and top-5 accuracy of each data set and top-1 averaged over its classes, and notes.

    An item competes with the classes of its set, as in training; `chance` is that of a random order of them. A k of at
    least the number of classes is left out. Items without a label that the run has learned are counted in a note.
    """
    device = next(model.parameters()).device
    hits: dict[str | None, list[tuple[Tensor, Tensor]]] = {}
    left: Counter[str] = Counter()
    with progress_bar(desc=f"classifying {modality}s", unit=modality, disable=not progress) as bar:
        for pack in packs:
            left.update(pack.bad)
            left.update(pack.filtered)
            rows = [classes.row(name, label) for name, label in zip(pack.sets, pack.labels, strict=True)]
            left["without a label that the run has learned"] += rows.count(None)
            if any(row is not None for row in rows):
                logits = class_logits(model, pack.pixels.to(device), pack.frames, pack.grid_thw).cpu()
                for name in dict.fromkeys(pack.sets):
                    some = [at for at, row in enumerate(rows) if row is not None and pack.sets[at] == name]
                    if some:
                        hits.setdefault(name, []).append(_hits(logits[some], [rows[at] for at in some], classes, name))
            bar.update(len(pack))
    found = [name for name in classes.names if name in hits]
    figures = [one for name in found for one in _figures(hits[name], len(classes.names[name]), name, modality)]
    counted = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()) if count)
    return figures, [f"Some {modality}s were left out: {counted}; {VERIFY_HINT}."] if counted else []


def _hits(logits: Tensor, rows: list[int], classes: ClassList, name: str | None) -> tuple[Tensor, Tensor]:
    """Returns the class of each item within its set, (n,), and whether it is among the first k, (len(KS), n)."""
    begin, end = classes.spans[name]
    truth = torch.tensor(rows) - begin
    counts = rank_counts(logits[:, begin:end].double(), truth[:, None] == torch.arange(end - begin))
    return truth, torch.stack([hit_at(k, *counts) for k in KS])


def _figures(parts: list[tuple[Tensor, Tensor]], among: int, name: str | None, modality: Modality) -> list[Figure]:
    truth, table = torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts], dim=1)
    hits = dict(zip(KS, table, strict=True))
    return accuracies(truth, hits, "classification", modality, among, name)
