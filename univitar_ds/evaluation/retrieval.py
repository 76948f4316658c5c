"""Retrieval in both directions: recall at 1, 5 and 10 of captions for items and of items for captions.

Equal captions count as one. The right answers for an item are its captions among all distinct captions; the right
answers for a caption are all items with this caption. A query is a hit if one right answer is among the first k. The
captions of an item are the one that was embedded with it and, if its source has `captions: lines`, all other lines of
its text file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.scores import Figure, bootstrap_interval, chance_at, chunks, hit_at, rank_counts
from univitar_ds.evaluation.zero_shot import Texts
from univitar_ds.tokenization import caption_id

KS = (1, 5, 10)
"""Values of k for which R@k is computed."""


def retrieval(embeddings: Embeddings, texts: Texts | None = None) -> list[Figure]:
    """Computes R@k in both directions among the items with a caption, for each k below the number of candidates.

    Args: texts: embeds sentences; needed only if items have other captions.
    Returns: scores; empty if no item has a caption.
    """
    rows = embeddings.captioned
    if not rows:
        return []
    vision = embeddings.vision[rows]
    vectors, items, captions = _captions(embeddings, rows, texts)
    order = torch.argsort(captions, stable=True)
    carried, carriers = torch.bincount(items).tolist(), torch.bincount(captions).tolist()
    kind = embeddings.modality
    figures = []
    for task, hits, right, candidates in (
        (f"{kind} to text", _hits(vision, vectors, items, captions), carried, len(vectors)),
        (f"text to {kind}", _hits(vectors, vision, captions[order], items[order]), carriers, len(rows)),
    ):
        for k in KS:
            if k < candidates:
                chance = sum(chance_at(k, m, candidates) for m in right) / len(right)
                value, interval = hits[k].mean().item(), bootstrap_interval(hits[k])
                about = chance, len(right), candidates
                figures.append(Figure(task, f"R@{k}", kind, value, *about, interval=interval))
    return figures


def _captions(embeddings: Embeddings, rows: Sequence[int], texts: Texts | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the vectors of the m distinct captions (m, E), and the p distinct pairs of an item and its caption.

    The pairs are two (p,) tensors sorted by item: an index into `rows`, and an index into the vectors.
    """
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(embeddings.caption_ids[row], row)
    column_of = {caption: column for column, caption in enumerate(first)}
    other_captions: list[str] = []
    pairs: dict[tuple[int, int], None] = {}
    for item, row in enumerate(rows):
        pairs[item, column_of[embeddings.caption_ids[row]]] = None
        for other in embeddings.others[row] if embeddings.others else ():
            column = column_of.setdefault(caption_id(other), len(column_of))
            if column == len(first) + len(other_captions):
                other_captions.append(other)
            pairs[item, column] = None
    vectors = embeddings.text[list(first.values())]
    if other_captions:
        assert texts is not None, "the items have other captions, but no function embeds them"
        vectors = torch.cat([vectors, texts(other_captions)])
    items, captions = torch.tensor(list(pairs)).T.contiguous()
    return vectors, items, captions


def _hits(queries: Tensor, gallery: Tensor, asked: Tensor, right: Tensor) -> dict[int, Tensor]:
    """Returns, for each k, the probability that a right candidate is among the first k of each query, (n,) float64.

    Args: asked, right: (p,) indices, with `asked` ascending; candidate right[i] is right for query asked[i].
    """
    gallery = gallery.double()
    hits: dict[int, list[Tensor]] = {k: [] for k in KS}
    for rows in chunks(len(queries), len(gallery)):
        begin, end = torch.searchsorted(asked, torch.stack([rows[0], rows[-1] + 1])).tolist()
        is_right = torch.zeros(len(rows), len(gallery), dtype=torch.bool)
        is_right[asked[begin:end] - rows[0], right[begin:end]] = True
        counts = rank_counts(queries[rows].double() @ gallery.T, is_right)
        for k in KS:
            hits[k].append(hit_at(k, *counts))
    return {k: torch.cat(parts) for k, parts in hits.items()}
