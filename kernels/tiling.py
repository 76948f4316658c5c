"""Tiling of the rows of fused kernels, as pure functions of widths: no kernel has an autotuner.

A row is D or F values of a token. Few of the model's widths are powers of two, and Triton's blocks always are: one
block of the next power of two would leave 37 % of the lanes idle at 1280 or 5120. A row is therefore covered by equal
tiles, and only the rest of the last tile is masked. Every thread loads 16 bytes of a tile at once. Fewer warps per row
make the sum of a row cheaper: one warp needs neither shared memory nor a barrier. The number of warps is the smallest
that keeps a thread's values within the register limit of its kernel.
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
"""Number of warps of one program. A program has several rows if one row is too short for all warps."""
FORWARD_VALUES, BACKWARD_VALUES = 64, 24
"""Maximum number of values of one input in a thread. A backward keeps four or five such sets (values, gradients, the
weight and its gradient); with 24 values 8 warps share the 65,536 registers of an SM without spilling."""
BYTES_IN_FLIGHT = 32 * 1024
"""Bytes that an SM must have in flight to keep the memory busy, for any number of warps: the bytes that arrive in
0.9 us at 4.8 TB/s shared by 132 SMs (derived, not measured)."""
SCRATCH_BYTES = 1024
"""Upper bound on the bytes of shared memory that a backward uses for the sums of rows."""
PROGRAMS_PER_SM = 1
"""Number of programs of a backward per SM. Each program writes a partial row of the weights' gradient, so a backward
runs few programs with long loops."""


class Tiling(NamedTuple):
    """`rows` rows per program, each covered by `tiles` tiles of `block` values."""

    rows: int
    block: int
    tiles: int
    warps: int

    @property
    def values(self) -> int:
        """Number of values of one input in a program, including masked values."""
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
    """`rows` tokens per program; `pieces` are the fields of each `Piece` as a tuple."""

    rows: int
    pieces: tuple[tuple[int, ...], ...]
    warps: int

    @property
    def values(self) -> int:
        """Number of values of one input in a program, including masked values."""
        return self.rows * sum(2 * pairs * block * tiles for _, pairs, block, tiles, _ in self.pieces)


@cache
def row_tiling(width: int, itemsize: int, *, backward: bool) -> Tiling:
    """Returns the tiling of rows of `width` values of `itemsize` bytes."""
    max_warps, max_values = _bounds(backward)
    vector = VECTOR_BYTES // itemsize
    warps = _fewest(max_warps, lambda warps: -(-width // (WARP * vector * warps)) * vector <= max_values)
    block = min(WARP * vector * warps, _power_of_two(width))
    return Tiling(max_warps // warps, block, -(-width // block), max_warps)


@cache
def head_tiling(heads: int, head_width: int, itemsize: int, *, backward: bool) -> HeadTiling:
    """Returns the tiling of rows of `heads` heads of K values, where the rotation combines values i and i + K/2.

    K/2 is split into two pieces if one power of two would waste more than an eighth: 40 = 32 + 8, 48 = 32 + 16, but 60
    is one piece of 64.
    """
    max_warps, max_values = _bounds(backward)
    half = head_width // 2
    cut = _power_of_two(half) // 2 if 8 * half < 7 * _power_of_two(half) else half
    spans = [(first, end) for first, end in ((0, cut), (cut, half)) if end > first]
    vector = min(VECTOR_BYTES // itemsize, half & -half)
    pairs_held = lambda warps: sum(_pairs_per_thread(heads, end - first, vector, warps) for first, end in spans)  # noqa: E731
    warps = _fewest(max_warps, lambda warps: 2 * pairs_held(warps) <= max_values)
    pieces: list[Piece] = []
    for first, end in spans:
        pairs = _power_of_two(end - first)
        block = min(max(1, WARP * vector * warps // pairs), _power_of_two(heads))
        pieces.append(Piece(first, pairs, block, -(-heads // block), sum(piece.tiles for piece in pieces)))
    return HeadTiling(max_warps // warps, tuple(tuple(piece) for piece in pieces), max_warps)


def stages(round_bytes: int, shared_bytes: int) -> int:
    """Returns the pipeline stages of a backward's loop that reads `round_bytes` per round, for `shared_bytes` of shared
    memory.

    A loop of n stages has n - 1 rounds in shared memory: the current round and n - 2 rounds in flight. With two stages
    the next round is read only after the current round. One stage uses only registers.
    """
    wanted = 1 + -(-BYTES_IN_FLIGHT // round_bytes)
    return 1 + min(wanted, (shared_bytes - SCRATCH_BYTES) // round_bytes)


def programs(rows: int, rows_of_a_program: int, processors: int) -> int:
    """Returns the number of programs of a backward, which loop over the rows."""
    return min(-(-rows // rows_of_a_program), PROGRAMS_PER_SM * processors)


def dense_rows(x: Tensor) -> Tensor:
    """Returns `x` (T, ...) if its rows are dense, with any stride between rows; a contiguous copy otherwise."""
    return x if x[:1].is_contiguous() else x.contiguous()


def _bounds(backward: bool) -> tuple[int, int]:
    """Returns the maximum number of warps of a program and of values of one input in a thread."""
    return (BACKWARD_WARPS, BACKWARD_VALUES) if backward else (FORWARD_WARPS, FORWARD_VALUES)


def _pairs_per_thread(heads: int, pairs: int, vector: int, warps: int) -> int:
    """Returns the number of a piece's pairs in one thread: whole vectors, or an even share of a small piece."""
    pairs, threads = _power_of_two(pairs), WARP * warps
    whole = -(-heads * pairs // (threads * vector)) * vector
    return min(whole, max(1, _power_of_two(heads) * pairs // threads))


def _fewest(max_warps: int, fits: Callable[[int], bool]) -> int:
    """Returns the smallest power of two that fits, at most `max_warps`."""
    warps = 1
    while warps < max_warps and not fits(warps):
        warps *= 2
    return warps


def _power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
