"""Compares all images of this rank with the texts of a step, one chunk of texts at a time.

A chunk needs one block of logits, 4 * n * chunk bytes for n images of this rank, since the losses replace the logits by
their gradient in place. Plain torch, on a CPU, needs up to two more such blocks. Every chunk runs the same kernels,
whichever rank its texts come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16
"""Rows of logits begin at multiples of this number of values, so that a kernel can read several values at once."""


@dataclass(frozen=True)
class Chunk:
    """A chunk of texts: its `span` of all texts, the `logits` (n, c), the column `first` of the text of image 0, which
    may be in another chunk, and the caption `ids` of images and texts if equal captions are positive."""

    span: slice
    logits: Tensor
    first: int
    ids: tuple[Tensor, Tensor] | None


def compared(
    images: Tensor,
    texts: Tensor,
    ids: tuple[Tensor, Tensor] | None = None,
    *,
    chunk: int,
    first: int,
    shifts: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Chunk]:
    """Yields the chunks with the products of `images` (n, k) and `texts` (m, k). The next chunk reuses the memory.

    Args: ids: caption ids of all images and of all texts. first: the index of the text of image 0 among the texts.
        shifts: (n,) of rows and (m,) of columns; log(exp(row's shift) + exp(column's shift)) is added to each product.
    """
    if not len(images):
        return
    width = min(chunk, len(texts))
    buffer = images.new_empty(len(images), -(-width // ALIGNED) * ALIGNED)
    for start in range(0, len(texts), chunk):
        span = slice(start, min(start + chunk, len(texts)))
        logits = buffer[:, : span.stop - span.start]
        if shifts is None:
            torch.mm(images, texts[span].T, out=logits)
        else:
            torch.logaddexp(shifts[0][:, None], shifts[1][None, span], out=logits)
            logits.addmm_(images, texts[span].T)
        yield Chunk(span, logits, first - start, None if ids is None else (ids[0], ids[1][span]))
