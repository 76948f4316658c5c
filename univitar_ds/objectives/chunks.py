"""The texts of a step in chunks, each compared with all images of this rank.

The memory of a chunk is one block of logits, 4 * n * chunk bytes for n images of this rank: the fused losses replace
the logits by their gradient in place; in plain torch, on a CPU, they have up to two more such blocks. Every chunk takes
the same kernels, whichever rank has its texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16
"""Rows of logits begin at a multiple of so many values, for which a kernel reads several values at once."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of texts: its `span` of all texts, the `logits` (n, c), the column `first` of the text of image 0, which
    may be in another chunk, and the caption `ids` of images and texts if equal captions are positive."""

    span: slice
    logits: Tensor
    first: int
    ids: tuple[Tensor, Tensor] | None


def compared(
    images: Tensor, texts: Tensor, ids: tuple[Tensor, Tensor] | None, *, chunk: int, first: int
) -> Iterator[Chunk]:
    """Yields the chunks with the products of `images` (n, k) and `texts` (m, k); their memory is reused.

    Args: ids: of all images and of all texts. first: the place of the text of image 0 among the texts.
    """
    if not len(images):
        return
    width = min(chunk, len(texts))
    buffer = images.new_empty(len(images), -(-width // ALIGNED) * ALIGNED)
    for start in range(0, len(texts), chunk):
        span = slice(start, min(start + chunk, len(texts)))
        logits = buffer[:, : span.stop - span.start]
        torch.mm(images, texts[span].T, out=logits)
        yield Chunk(span, logits, first - start, None if ids is None else (ids[0], ids[1][span]))
