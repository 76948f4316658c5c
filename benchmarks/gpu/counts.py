"""Bytes and matrix products of the operations, counted by hand; kernels/README.md has the derivations.

The counts assume a perfect cache: every tensor of T rows is read or written once per pass, vectors of one row are free.
"""

from __future__ import annotations

from benchmarks.gpu.packs import FRAME_BYTES

PASSES = ("forward", "backward")
ROWS_MOVED = {
    # x; y | x, dy; dx
    "rms_norm": (2, 3),
    # x, branch; sum, y | sum, branch, dsum, dy; dx, dbranch
    "add_norm": (4, 6),
    # gate, up; y | gate, up, dy; dgate, dup
    "swiglu_norm": (3, 5),
    # q, k; q, k | q, k, dq, dk, dv; dq, dk, dv
    "rope2d_qk_norm": (4, 8),
}
"""Number of rows of the operation's width that one token reads and writes: (forward, backward)."""
POSITION_BYTES = 16
"""Bytes of one token's row and column, both int64."""


def moved_bytes(op: str, direction: str, tokens: int, width: int, itemsize: int) -> int:
    """Returns the bytes that a pass of a row-wise operation reads and writes.

    Args: op: a key of `ROWS_MOVED`. direction: one of `PASSES`. width: values per row."""
    rows = ROWS_MOVED[op][PASSES.index(direction)] * width * itemsize
    return tokens * (rows + (POSITION_BYTES if op == "rope2d_qk_norm" else 0))


def patch_embed_bytes(pixel_bytes: int, tokens: int, width: int, itemsize: int) -> int:
    """Returns the bytes of pixels, tokens and weights; in the backward, of pixels and both gradients, as many bytes."""
    return pixel_bytes + (tokens * width + 2 * FRAME_BYTES * width) * itemsize


def patch_embed_product(tokens: int, width: int, still: bool) -> tuple[int, int, int]:
    """Returns (m, k, n) of the patch embedding's matrix product. With `still`, k is one frame: the two temporal kernels
    are summed."""
    return tokens, FRAME_BYTES * (1 if still else 2), width


def aligned(values: int, itemsize: int) -> int:
    """Rounds `values` up to a multiple of 16 bytes, which cuBLAS's fast kernels need: 588 to 592 in bfloat16."""
    step = 16 // itemsize
    return -(-values // step) * step
