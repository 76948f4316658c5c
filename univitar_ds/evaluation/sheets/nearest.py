"""Finds the captions nearest to an item, and the items nearest to a caption, for the sheets of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings

SHOWN_CAPTIONS, SHOWN_ITEMS = 3, 4
"""Maximum number of captions that are shown for an item, and of items for a caption."""


@dataclass(frozen=True)
class Nearest:
    """The candidates nearest to an item or to a caption, among `count`.

    `best` has the nearest ones, each with (its row in the embeddings, whether it is correct, cosine similarity). `rank`
    is the position of the first correct one, from 1, after incorrect ones of equal similarity, and `cosine` its
    similarity. A correct candidate with the similarity NaN is last, and an incorrect one first.
    """

    best: list[tuple[int, bool, float]]
    rank: int
    cosine: float
    count: int

    @property
    def place(self) -> str | None:
        """Where the first correct candidate is, as a text; None if `best` has it."""
        shown = any(correct for _, correct, _ in self.best)
        return None if shown else f"place {self.rank} of {self.count}, {self.cosine:.3f}"


def nearest_captions(embeddings: Embeddings, row: int) -> Nearest | None:
    """Returns the distinct captions nearest to item `row`; None for an item without a caption.

    All captions of an item are its own, not only the first.
    """
    if not embeddings.captions[row]:
        return None
    first = {embeddings.caption_ids[index]: index for index in reversed(embeddings.captioned)}
    candidates = sorted(first.values())
    own = [_belongs(embeddings, row, caption) for caption in candidates]
    return _nearest(embeddings.text[candidates] @ embeddings.vision[row], own, candidates, SHOWN_CAPTIONS)


def nearest_items(embeddings: Embeddings, row: int, candidates: list[int]) -> Nearest | None:
    """Returns those of the items `candidates` that are nearest to the caption of item `row`; None if it has no caption,
    or if none of the candidates has this caption."""
    own = [_belongs(embeddings, item, row) for item in candidates]
    if not embeddings.captions[row] or not any(own):
        return None
    return _nearest(embeddings.vision[candidates] @ embeddings.text[row], own, candidates, SHOWN_ITEMS)


def _belongs(embeddings: Embeddings, item: int, caption: int) -> bool:
    """Returns whether the caption of row `caption` is one of those of row `item`."""
    further = embeddings.others[item] if embeddings.others else ()
    same = embeddings.caption_ids[caption] == embeddings.caption_ids[item]
    return same or embeddings.captions[caption] in further


def _nearest(scores: Tensor, correct: Sequence[bool], candidates: list[int], shown: int) -> Nearest:
    own = torch.tensor(correct)
    # Otherwise a model with NaN weights would always be right, since no score compares as higher.
    ordered = torch.where(scores.isnan(), torch.where(own, -torch.inf, torch.inf), scores)
    best = ordered.topk(min(shown, len(candidates))).indices.tolist()
    return Nearest(
        best=[(candidates[index], bool(own[index]), float(scores[index])) for index in best],
        rank=1 + int(((ordered >= ordered[own].max()) & ~own).sum()),
        cosine=float(scores[own][ordered[own].argmax()]),
        count=len(candidates),
    )
