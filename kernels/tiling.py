"""How the fused kernels cut their rows, as pure functions of widths: no kernel has an autotuner.

A row is D or F values of a token; few of the model's widths are powers of two, and Triton's blocks always are. One
block over the next power of two would leave 37 % of the lanes idle at 1280 or 5120. So a row is covered by equal
tiles, and the rest of the last tile is all that is masked. Every thread loads 16 bytes of a tile at once. The more of
a row a thread holds, the fewer warps share its sum: one warp needs no shared memory and no barrier at all. What bounds
it is registers, so the fewest warps are taken that keep a thread's share within what its kernel says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WARP = 32
VECTOR_BYTES = 16
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
"""Warps of one program; rows too short to fill them stand in it side by side."""
FORWARD_VALUES, BACKWARD_VALUES = 48, 24
"""Values of one input that a thread may hold: a backward keeps three or four such sets, a forward one or two."""
PROGRAMS_PER_SM = 2
"""Of a backward. Each ends in one partial row of the weights' gradient, so they are few, and long-lived: 2 * 8 warps
fill the 65,536 registers of an SM at 128 a thread."""


@dataclass(frozen=True)
class Tiling:
    """`rows` rows a program, each covered by `tiles` tiles: of `block` values, or `block` heads of K values."""

    rows: int
    block: int
    tiles: int
    warps: int


def row_tiling(width: int, itemsize: int, *, backward: bool) -> Tiling:
    """For rows of `width` values of `itemsize` bytes."""
    vector = VECTOR_BYTES // itemsize
    return _tiling(width, WARP * vector, lambda tiles: tiles * vector, backward)


def head_tiling(heads: int, head_width: int, itemsize: int, *, backward: bool) -> Tiling:
    """For rows of `heads` heads. A tile has `block` heads by the next power of two above half a head: the rotation
    takes the two halves of a head together. Half a head of 60 values leaves loads of 8 bytes: it ends between two 16s.
    """
    half = head_width // 2
    vector = min(VECTOR_BYTES // itemsize, half & -half)
    heads_of_a_warp = max(1, WARP * vector // _power_of_two(half))
    return _tiling(heads, heads_of_a_warp, lambda tiles: 2 * tiles * vector, backward)


def programs(rows: int, tiling: Tiling, device: torch.device) -> int:
    """Of a backward that walks over its rows. Off the GPU (Triton's interpreter) three, so that they do walk."""
    count = 3
    if device.type == "cuda":
        count = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    return min(-(-rows // tiling.rows), count)


def dense_rows(x: Tensor) -> Tensor:
    """`x` (T, ...) itself if its rows are dense, whatever lies between them; a copy otherwise."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _tiling(length: int, of_a_warp: int, values, backward: bool) -> Tiling:
    most, limit = (BACKWARD_WARPS, BACKWARD_VALUES) if backward else (FORWARD_WARPS, FORWARD_VALUES)
    warps = 1
    while warps < most and values(-(-length // (of_a_warp * warps))) > limit:
        warps *= 2
    block = min(of_a_warp * warps, _power_of_two(length))
    return Tiling(rows=most // warps, block=block, tiles=-(-length // block), warps=most)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
