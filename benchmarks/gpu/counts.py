"""What the operations must move and multiply, counted by hand; kernels/README.md has the derivations.

Bytes are those of a perfect cache: every tensor of T rows once in each direction, vectors of one row not at all.
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
"""Rows of the operation's width that one token reads and writes: forward, backward."""
POSITION_BYTES = 16


def moved_bytes(op: str, direction: str, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of an operation over rows."""
    rows = ROWS_MOVED[op][PASSES.index(direction)] * width * itemsize
    return tokens * (rows + (POSITION_BYTES if op == "rope2d_qk_norm" else 0))


def patch_embed_bytes(pixel_bytes: int, tokens: int, width: int, itemsize: int) -> int:
    """Pixels, tokens (or their gradient) and the weights (or theirs), in either direction."""
    return pixel_bytes + (tokens * width + 2 * FRAME_BYTES * width) * itemsize


def patch_embed_product(tokens: int, width: int, still: bool) -> tuple[int, int, int]:
    """(m, k, n) of its matrix product; a still image meets the sum of its two temporal kernels."""
    return tokens, FRAME_BYTES * (1 if still else 2), width


def aligned(values: int, itemsize: int) -> int:
    """The next length whose rows start at multiples of 16 bytes, as cuBLAS's fast kernels need it: 592 after 588."""
    step = 16 // itemsize
    return -(-values // step) * step
