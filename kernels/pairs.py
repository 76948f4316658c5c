"""Functions of the kernels of the contrastive losses that run one program per image."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Number of logits that a program reads at once: 8 for each thread. The default chunk has as many texts."""
WARPS = 4


@triton.jit
def is_positive(OWN_IDS, IDS, row, at, inside, first, HAS_IDS: tl.constexpr):
    """Returns which of the texts `at` belong to the image `row`: its own text, at row + first, and with ids the texts
    with the same caption."""
    positive = at == row + first
    if HAS_IDS:
        positive = positive | (tl.load(IDS + at, mask=inside, other=0) == tl.load(OWN_IDS + row))
    return positive & inside


def given(ids: tuple[Tensor, Tensor] | None, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the ids as arguments of a kernel; without ids `logits`, which the kernel does not read as ids."""
    return (logits, logits) if ids is None else ids
