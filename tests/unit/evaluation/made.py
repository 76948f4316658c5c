"""Embeddings made by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.evaluation.embed import Embeddings


def made(
    vision: Tensor,
    text: Tensor,
    captions: list[str],
    labels: list[str | None] | None = None,
    sets: list[str | None] | None = None,
) -> Embeddings:
    """Items with these vectors, made unit vectors; equal captions get equal ids."""
    ids = [sorted(set(captions)).index(caption) + 100 for caption in captions]
    return Embeddings(
        F.normalize(vision.float(), dim=-1),
        F.normalize(text.float(), dim=-1),
        captions,
        ids,
        labels or [None] * len(captions),
        sets or [None] * len(captions),
        [f"shard/{row:04d}" for row in range(len(captions))],
        "image",
    )


def random_rows(rows: int, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
