"""Retrieval both ways: recall at 1, 5 and 10 of captions for items and of items for captions.

Captions that are the same are one caption. An item's right answer is its caption, among all distinct ones;
a caption's right answers are all items that carry it, and one of them among the first k is enough.
"""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.scores import Figure, chance_at, chunks, hit_at, rank_counts

KS = (1, 5, 10)


def retrieval(found: Embeddings) -> list[Figure]:
    """R@k of both directions. Nothing without items; a k that takes in every candidate is left out."""
    if not len(found):
        return []
    first: dict[int, int] = {}
    for row, caption in enumerate(found.caption_ids):
        first.setdefault(caption, row)
    place = {caption: column for column, caption in enumerate(first)}
    caption_of = torch.tensor([place[caption] for caption in found.caption_ids])
    texts = found.text[list(first.values())]
    to_text = _hits(found.vision, texts, lambda rows: caption_of[rows, None] == torch.arange(len(texts)))
    to_item = _hits(texts, found.vision, lambda rows: rows[:, None] == caption_of)
    carriers = torch.bincount(caption_of).tolist()
    kind = found.modality
    figures = []
    for task, hits, right, candidates in (
        (f"{kind} to text", to_text, [1] * len(found), len(texts)),
        (f"text to {kind}", to_item, carriers, len(found)),
    ):
        for k in KS:
            if k < candidates:
                chance = sum(chance_at(k, m, candidates) for m in right) / len(right)
                value = hits[k].mean().item()
                figures.append(Figure(task, f"R@{k}", kind, value, chance, len(right), candidates))
    return figures


def _hits(queries: Tensor, gallery: Tensor, right_of) -> dict[int, Tensor]:
    """For each k the (n,) probability that a query finds a right candidate among its first k."""
    gallery = gallery.double()
    found: dict[int, list[Tensor]] = {k: [] for k in KS}
    for rows in chunks(len(queries), len(gallery)):
        counts = rank_counts(queries[rows].double() @ gallery.T, right_of(rows))
        for k in KS:
            found[k].append(hit_at(k, *counts))
    return {k: torch.cat(parts) for k, parts in found.items()}
