"""The softmax contrastive loss of all pairs of a chunk: normalisers of rows and columns, then the gradient in place.

    rows       one program per image: updates its normaliser, counts its positives and sums their logits
    columns    one program per `TEXTS` texts: computes their normalisers over this rank's images
    softmax    one program per image: overwrites each logit with its gradient
Logits are read twice for the normalisers, since a program sums along one direction only; a chunk is small enough for
the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from univitar_ds.kernels import gpu
from univitar_ds.kernels.pairs import COLUMNS, WARPS, given, is_positive

TEXTS, IMAGES = 32, 32
"""Tile of a program over columns: 128 bytes of each row, and 32 programs for a chunk of 1,024 texts."""


@triton.jit(do_not_specialize=["first"])
def rows_kernel(
    LOGITS, NORMS, COUNTS, SUMS, OWN_IDS, IDS, first, C, stride, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.load(NORMS + row)  # of earlier chunks, as one term of the sum; -inf at first
    total = 1.0
    count = tl.zeros((BLOCK,), tl.float32)
    matched = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < C
        logit = tl.load(LOGITS + row * stride + at, mask=inside, other=float("-inf"))
        positive = is_positive(OWN_IDS, IDS, row, at, inside, first, HAS_IDS)
        count += tl.where(positive, 1.0, 0.0)
        matched += tl.where(positive, logit, 0.0)
        larger = tl.maximum(largest, tl.max(logit, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger), 0)
        largest = larger
    tl.store(NORMS + row, largest + tl.log(total))
    tl.store(COUNTS + row, tl.load(COUNTS + row) + tl.sum(count, 0))
    tl.store(SUMS + row, tl.load(SUMS + row) + tl.sum(matched, 0))


@triton.jit(do_not_specialize=["N"])
def columns_kernel(LOGITS, NORMS, N, C, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < N)[:, None] & (at < C)[None, :]
        logit = tl.load(LOGITS + row[:, None] * stride + at[None, :], mask=inside, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(logit, 0))
        larger = tl.where(at < C, larger, 0.0)  # avoids -inf - -inf = nan in columns that do not exist
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger[None, :]), 0)
        largest = larger
    tl.store(NORMS + at, largest + tl.log(total), mask=at < C)


@triton.jit(do_not_specialize=["first"])
def softmax_kernel(
    LOGITS, ROW_SHIFTS, COLUMN_SHIFTS, WEIGHTS, OWN_IDS, IDS, first, C, stride,
    HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_shift = tl.load(ROW_SHIFTS + row)
    weight = tl.load(WEIGHTS + row)
    for start in range(0, C, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < C
        logit = tl.load(LOGITS + row * stride + at, mask=inside, other=0.0)
        column_shift = tl.load(COLUMN_SHIFTS + at, mask=inside, other=0.0)
        positive = is_positive(OWN_IDS, IDS, row, at, inside, first, HAS_IDS)
        gradient = tl.exp(logit + row_shift) + tl.exp(logit + column_shift) - tl.where(positive, weight, 0.0)
        tl.store(LOGITS + row * stride + at, gradient, mask=inside)


def softmax_norms(
    logits: Tensor,
    row_norms: Tensor,
    column_norms: Tensor,
    counts: Tensor,
    sums: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """Computes `kernels.reference.softmax_norms` on a GPU."""
    rows, columns = logits.shape
    if rows and columns:
        gpu.launch(
            rows_kernel, (rows,), logits, row_norms, counts, sums, *given(ids, logits), first, columns,
            logits.stride(0), HAS_IDS=ids is not None, BLOCK=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        gpu.launch(
            columns_kernel, (-(-columns // TEXTS),), logits, column_norms, rows, columns, logits.stride(0),
            ROWS=IMAGES, BLOCK=TEXTS, num_warps=WARPS,
        )  # fmt: skip


def softmax_pairs(
    logits: Tensor,
    row_shifts: Tensor,
    column_shifts: Tensor,
    weights: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """Computes `kernels.reference.softmax_pairs` on a GPU."""
    rows, columns = logits.shape
    if rows and columns:
        gpu.launch(
            softmax_kernel, (rows,), logits, row_shifts, column_shifts, weights, *given(ids, logits), first, columns,
            logits.stride(0), HAS_IDS=ids is not None, BLOCK=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
