"""The sigmoid contrastive loss of all pairs of a chunk, and its gradient, in one pass over the logits.

A program has one image and goes through the texts of the chunk. It reads every logit once and writes its gradient to
the same place, so a chunk needs no memory besides its logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from univitar_ds.kernels import gpu
from univitar_ds.kernels.pairs import COLUMNS, WARPS, given, is_positive


@triton.jit(do_not_specialize=["first"])
def sigmoid_kernel(
    LOGITS, LOSSES, OWN_IDS, IDS, first, C, stride, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < C
        logit = tl.load(LOGITS + row * stride + at, mask=inside, other=0.0)
        positive = is_positive(OWN_IDS, IDS, row, at, inside, first, HAS_IDS)
        x = tl.where(positive, -logit, logit)
        small = tl.exp(-tl.abs(x))  # both branches of sigmoid and softplus without overflow
        whole = 1.0 + small
        # log(1 + small), corrected for the rounding of `whole`: far negatives have a loss below 2^-24.
        exact = tl.where(whole == 1.0, small, tl.log(whole) * (small / tl.where(whole == 1.0, 1.0, whole - 1.0)))
        loss += tl.where(inside, tl.maximum(x, 0.0) + exact, 0.0)
        share = tl.where(x >= 0.0, 1.0, small) / whole
        tl.store(LOGITS + row * stride + at, tl.where(positive, -share, share), mask=inside)
    tl.store(LOSSES + row, tl.sum(loss, 0))


def sigmoid_pairs(logits: Tensor, losses: Tensor, first: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """Computes `kernels.reference.sigmoid_pairs` on a GPU."""
    rows, columns = logits.shape
    if rows and columns:
        gpu.launch(
            sigmoid_kernel, (rows,), logits, losses, *given(ids, logits), first, columns, logits.stride(0),
            HAS_IDS=ids is not None, BLOCK=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
