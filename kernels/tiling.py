"""Tiling of the rows of fused kernels, as pure functions of widths: no kernel has an autotuner.

A row is D or F values of a token; few of the model's widths are powers of two, and Triton's blocks always are. One
block over the next power of two would leave 37 % of the lanes idle at 1280 or 5120. So a row is covered by equal
tiles, and only the rest of the last tile is masked. Every thread loads 16 bytes of a tile at once. The more of a row
a thread holds, the fewer warps share its sum: one warp needs neither shared memory nor a barrier. Registers limit this,
so the number of warps is the smallest that keeps a thread's share within the limit of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from torch import Tensor

WARP = 32
VECTOR_BYTES = 16
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
"""Warps of one program; several rows that are too short to fill them share it."""
FORWARD_VALUES, BACKWARD_VALUES = 64, 24
"""Values of one input that a thread may hold. A backward keeps four or five such sets (values, gradients, the weight
and its gradient), so this many let 8 warps share the 65,536 registers of an SM without spilling."""
UNDER_WAY = 32 * 1024
"""Bytes that an SM must have in flight to keep the memory busy, for any number of warps: those that arrive
in 0.9 us at 4.8 TB/s shared by 132 SMs (derived, not measured)."""
SCRATCH_BYTES = 1024
"""Upper bound of a backward's shared memory for the sums of rows."""
PROGRAMS_PER_SM = 1
"""Programs of a backward. Each writes one partial row of the weights' gradient, so there are few, which run long."""


class Tiling(NamedTuple):
    """`rows` rows per program, each covered by `tiles` tiles of `block` values."""

    rows: int
    block: int
    tiles: int
    warps: int

    @property
    def values(self) -> int:
        """Of one input, masked ones included."""
        return self.rows * self.block * self.tiles


class Piece(NamedTuple):
    """The pairs from `first` to `first + pairs` of all heads, in `tiles` tiles of `block` heads."""

    first: int
    pairs: int
    block: int
    tiles: int
    tiles_before: int


@dataclass(frozen=True)
class HeadTiling:
    """`rows` tokens per program, the pairs of their heads in `pieces`."""

    rows: int
    pieces: tuple[tuple[int, ...], ...]
    warps: int

    @property
    def values(self) -> int:
        """Of one input, masked ones included."""
        return self.rows * sum(2 * pairs * block * tiles for _, pairs, block, tiles, _ in self.pieces)


@cache
def row_tiling(width: int, itemsize: int, *, backward: bool) -> Tiling:
    """For rows of `width` values of `itemsize` bytes."""
    most, limit = _bounds(backward)
    vector = VECTOR_BYTES // itemsize
    warps = _fewest(most, lambda warps: -(-width // (WARP * vector * warps)) * vector <= limit)
    block = min(WARP * vector * warps, _power_of_two(width))
    return Tiling(most // warps, block, -(-width // block), most)


@cache
def head_tiling(heads: int, head_width: int, itemsize: int, *, backward: bool) -> HeadTiling:
    """For rows of `heads` heads of K values, where the rotation combines value i and value i + K/2.

    K/2 is split in two if one power of two would waste more than an eighth: 40 = 32 + 8, 48 = 32 + 16, but 60 of 64.
    """
    most, limit = _bounds(backward)
    half = head_width // 2
    cut = _power_of_two(half) // 2 if 8 * half < 7 * _power_of_two(half) else half
    spans = [(first, end) for first, end in ((0, cut), (cut, half)) if end > first]
    vector = min(VECTOR_BYTES // itemsize, half & -half)
    held = lambda warps: sum(2 * _held(heads, end - first, vector, warps) for first, end in spans)  # noqa: E731
    warps = _fewest(most, lambda warps: held(warps) <= limit)
    pieces: list[Piece] = []
    for first, end in spans:
        pairs = _power_of_two(end - first)
        block = min(max(1, WARP * vector * warps // pairs), _power_of_two(heads))
        pieces.append(Piece(first, pairs, block, -(-heads // block), sum(piece.tiles for piece in pieces)))
    return HeadTiling(most // warps, tuple(tuple(piece) for piece in pieces), most)


def stages(round_bytes: int, shared_bytes: int) -> int:
    """Pipeline stages of a backward's loop, which reads `round_bytes` per round, in `shared_bytes` of shared memory.

    A loop of n stages has n - 1 rounds in shared memory: the current one and n - 2 in flight. Two stages
    read the next round only after the current one, and one stage uses only registers.
    """
    wanted = 1 + -(-UNDER_WAY // round_bytes)
    return 1 + min(wanted, (shared_bytes - SCRATCH_BYTES) // round_bytes)


def programs(rows: int, rows_of_a_program: int, processors: int) -> int:
    """Programs of a backward, which loop over its rows."""
    return min(-(-rows // rows_of_a_program), PROGRAMS_PER_SM * processors)


def dense_rows(x: Tensor) -> Tensor:
    """`x` (T, ...) itself if its rows are dense, with any stride between them; a copy otherwise."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _bounds(backward: bool) -> tuple[int, int]:
    return (BACKWARD_WARPS, BACKWARD_VALUES) if backward else (FORWARD_WARPS, FORWARD_VALUES)


def _held(heads: int, pairs: int, vector: int, warps: int) -> int:
    """Pairs of a piece in one thread: whole vectors of a full tile, or an even share of a piece smaller than that."""
    pairs, threads = _power_of_two(pairs), WARP * warps
    whole = -(-heads * pairs // (threads * vector)) * vector
    return min(whole, max(1, _power_of_two(heads) * pairs // threads))


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    warps = 1
    while warps < most and not fits(warps):
        warps *= 2
    return warps


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
