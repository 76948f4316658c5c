"""Retrieval both ways: recall at 1, 5 and 10 of captions for items and of items for captions.

Equal captions count as one. The right answers for an item are its captions, among all distinct ones; those for a
caption are all items that have it. One of them among the first k is enough. An item has the caption that was embedded
with it or, if its source's captions are lines, all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.scores import Figure, chance_at, chunks, hit_at, rank_counts
from univitar_ds.evaluation.zero_shot import Texts
from univitar_ds.tokenization import caption_id

KS = (1, 5, 10)


def retrieval(found: Embeddings, texts: Texts | None = None) -> list[Figure]:
    """R@k of both directions, among the items that have a caption. A k that includes every candidate is left out.

    Args: texts: embeds the items' other captions, if there are any.
    """
    rows = found.captioned
    if not rows:
        return []
    vision = found.vision[rows]
    vectors, items, captions = _captions(found, rows, texts)
    order = torch.argsort(captions, stable=True)
    carried, carriers = torch.bincount(items).tolist(), torch.bincount(captions).tolist()
    kind = found.modality
    figures = []
    for task, hits, right, candidates in (
        (f"{kind} to text", _hits(vision, vectors, items, captions), carried, len(vectors)),
        (f"text to {kind}", _hits(vectors, vision, captions[order], items[order]), carriers, len(rows)),
    ):
        for k in KS:
            if k < candidates:
                chance = sum(chance_at(k, m, candidates) for m in right) / len(right)
                value = hits[k].mean().item()
                figures.append(Figure(task, f"R@{k}", kind, value, chance, len(right), candidates))
    return figures


def _captions(found: Embeddings, rows: Sequence[int], texts: Texts | None) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of the m distinct captions (m, E), and the matching pairs of an item and a caption, each
    once, in the order of the items: two (p,) of indices, those of items into `rows`."""
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(found.caption_ids[row], row)
    place = {caption: column for column, caption in enumerate(first)}
    more: list[str] = []
    pairs: dict[tuple[int, int], None] = {}
    for item, row in enumerate(rows):
        pairs[item, place[found.caption_ids[row]]] = None
        for other in found.others[row] if found.others else ():
            column = place.setdefault(caption_id(other), len(place))
            if column == len(first) + len(more):
                more.append(other)
            pairs[item, column] = None
    vectors = found.text[list(first.values())]
    if more:
        assert texts is not None, "the items have other captions, but no function embeds them"
        vectors = torch.cat([vectors, texts(more)])
    items, captions = torch.tensor(list(pairs)).T.contiguous()
    return vectors, items, captions


def _hits(queries: Tensor, gallery: Tensor, asked: Tensor, right: Tensor) -> dict[int, Tensor]:
    """For each k the (n,) probability that a query finds a right candidate among its first k.

    Args: asked, right (p,): that candidate right[i] is right for query asked[i], in ascending order of queries.
    """
    gallery = gallery.double()
    found: dict[int, list[Tensor]] = {k: [] for k in KS}
    for rows in chunks(len(queries), len(gallery)):
        begin, end = torch.searchsorted(asked, torch.stack([rows[0], rows[-1] + 1])).tolist()
        is_right = torch.zeros(len(rows), len(gallery), dtype=torch.bool)
        is_right[asked[begin:end] - rows[0], right[begin:end]] = True
        counts = rank_counts(queries[rows].double() @ gallery.T, is_right)
        for k in KS:
            found[k].append(hit_at(k, *counts))
    return {k: torch.cat(parts) for k, parts in found.items()}
