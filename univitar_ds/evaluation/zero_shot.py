"""Zero-shot classification: each item is assigned to the class with the nearest class vector.

A class is a label of the data set. The class vector is the normalised mean of the unit vectors of the class's sentences
(CLIP's prompt ensemble). Items without a label are not scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.scores import Figure, accuracies, chunks, hit_at, rank_counts

KS = (1, 5)
"""Values of k for which top-k accuracy is computed."""
MAX_SENTENCES = 1 << 16
"""Maximum number of sentences that are embedded at a time, unless one class has more."""

Texts = Callable[[Sequence[str]], Tensor]
"""Embeds n sentences: returns (n, E) unit vectors."""


def zero_shot(
    embeddings: Embeddings, templates: Sequence[str], texts: Texts, names: Sequence[str] = ()
) -> tuple[list[Figure], list[str]]:
    """Computes top-1 and top-5 accuracy over the scored items of each data set, and top-1 averaged over classes.

    The average over classes is not biased by class sizes: always predicting the largest class gives 1/classes.
    The classes of a data set are the labels that occur in it, and `names`. A k of at least the number of classes is
    left out.

    Args: templates: sentences with {} for the label; texts: embeds sentences; names: classes that need not occur.
    Returns: scores, and notes: one for each data set with only one label, or a single one if no item has a label.
    """
    rows_of: dict[str | None, list[int]] = {}
    for row, label in enumerate(embeddings.labels):
        if label is not None:
            rows_of.setdefault(embeddings.sets[row], []).append(row)
    figures: list[Figure] = []
    notes = [] if rows_of else [f"Zero-shot of {embeddings.modality}s: no item has a label."]
    for name in sorted(rows_of, key=lambda name: name or ""):
        rows = rows_of[name]
        classes = sorted({*names, *(embeddings.labels[row] for row in rows)})
        if len(classes) < 2:
            where = f" in {name}" if name else ""
            notes.append(
                f"Zero-shot of {embeddings.modality}s{where}: only one label, {classes[0]!r}; at least two are needed."
            )
            continue
        figures += _one_set(embeddings, rows, classes, class_vectors(classes, templates, texts), name)
    return figures, notes


def class_vectors(classes: Sequence[str], templates: Sequence[str], texts: Texts) -> Tensor:
    """Returns the class vectors: (classes, E) unit vectors."""
    at_once = max(1, MAX_SENTENCES // len(templates))
    means = []
    for start in range(0, len(classes), at_once):
        part = classes[start : start + at_once]
        vectors = texts([template.replace("{}", label) for label in part for template in templates])
        means.append(vectors.view(len(part), len(templates), -1).mean(dim=1))
    return F.normalize(torch.cat(means), dim=-1)


def _one_set(
    embeddings: Embeddings, rows: list[int], classes: list[str], vectors: Tensor, name: str | None
) -> list[Figure]:
    column_of = {label: column for column, label in enumerate(classes)}
    truth = torch.tensor([column_of[embeddings.labels[row]] for row in rows])
    columns, items, vectors = torch.arange(len(classes)), torch.tensor(rows), vectors.double()
    hits: dict[int, list[Tensor]] = {k: [] for k in KS}
    for part in chunks(len(rows), len(classes)):
        counts = rank_counts(embeddings.vision[items[part]].double() @ vectors.T, truth[part, None] == columns)
        for k in KS:
            hits[k].append(hit_at(k, *counts))

    top = {k: torch.cat(parts) for k, parts in hits.items()}
    return accuracies(truth, top, "zero-shot", embeddings.modality, len(classes), name)
