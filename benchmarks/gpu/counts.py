"""Bytes and matrix products of the fused operations, as formulas that kernels/README.md derives.

The counts assume a perfect cache: each pass reads its inputs once and writes its outputs once. Vectors (norm weights,
LayerScale, biases) are not counted.
"""

from __future__ import annotations

from benchmarks.gpu.packs import FRAME_BYTES

PASSES = ("forward", "backward")
ROWS_MOVED = {
    # forward: tensors read; written | backward: tensors read; written
    # x; y | x, dy; dx
    "rms_norm": (2, 3),
    # x, branch; sum, y | sum, branch, dsum, dy; dx, dbranch
    "add_norm": (4, 6),
    # gate, up; y | gate, up, dy; dgate, dup
    "swiglu_norm": (3, 5),
    # q, k; q, k | q, k, dq, dk, dv; dq, dk, dv
    "rope2d_qk_norm": (4, 8),
}
"""Number of rows that (forward, backward) read or write per token. A row has the width of the operation."""
POSITION_BYTES = 16
"""Bytes of one token's row and column, both int64."""


def moved_bytes(op: str, direction: str, tokens: int, width: int, itemsize: int) -> int:
    """Returns the bytes that a pass of a row-wise operation reads and writes.

    Args: op: a key of `ROWS_MOVED`. direction: one of `PASSES`. width: values per row."""
    rows = ROWS_MOVED[op][PASSES.index(direction)] * width * itemsize
    return tokens * (rows + (POSITION_BYTES if op == "rope2d_qk_norm" else 0))


def patch_embed_bytes(pixel_bytes: int, tokens: int, width: int, itemsize: int) -> int:
    """Returns the bytes that one pass reads and writes, the same number in both passes.

    The forward moves pixels, tokens and weights; the backward moves pixels and the gradients of tokens and weights.
    """
    return pixel_bytes + (tokens * width + 2 * FRAME_BYTES * width) * itemsize


def patch_embed_product(tokens: int, width: int, still: bool) -> tuple[int, int, int]:
    """Returns (m, k, n) of the patch embedding's matrix product.

    With `still`, k is the bytes of one frame only, because the weights of the two frames are summed.
    """
    return tokens, FRAME_BYTES * (1 if still else 2), width


def aligned(values: int, itemsize: int) -> int:
    """Rounds a number of values up so that they fill a multiple of 16 bytes, as cuBLAS's fast kernels require.

    In bfloat16, 588 becomes 592.
    """
    step = 16 // itemsize
    return -(-values // step) * step
