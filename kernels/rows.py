"""Functions of the kernels over whole rows, in tiles of R rows by BLOCK values (see `kernels.tiling`).

A forward program processes R rows. A backward program loops over rows with a stride and keeps its part of the weights'
gradients in registers. The parts are summed at the end in a fixed order, without atomics.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from univitar_ds.kernels import gpu
from univitar_ds.kernels.tiling import Tiling, programs, row_tiling, stages


@triton.jit
def load_rows(X, row, at, T, N: tl.constexpr):
    """Loads values `at` (1, BLOCK) of the rows `row` (R, 1) of X (T, N) as float32; zeros beyond the ends of X."""
    return tl.load(X + row * N + at, mask=(row < T) & (at < N), other=0.0).to(tl.float32)


@triton.jit
def store_rows(X, values, row, at, T, N: tl.constexpr):
    tl.store(X + row * N + at, values.to(X.dtype.element_ty), mask=(row < T) & (at < N))


@triton.jit
def load_vector(W, at, N: tl.constexpr, R: tl.constexpr):
    """Loads values `at` of a vector W (N,) for each of R rows as float32; zeros beyond the end of W.

    Every row loads the vector separately: each thread reads the L1 cache, without an exchange through shared memory.
    """
    at = tl.broadcast_to(at, (R, at.shape[1]))
    return tl.load(W + at, mask=at < N, other=0.0).to(tl.float32)


@triton.jit
def held_vector(W, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Loads all tiles of a vector W (N,) for R rows in W's dtype, which a backward program keeps during its loop."""
    tiles = ()
    for tile in tl.static_range(TILES):
        at = tl.broadcast_to(tile * BLOCK + tl.arange(0, BLOCK)[None, :], (R, BLOCK))
        tiles += (tl.load(W + at, mask=at < N, other=0.0),)
    return tiles


@triton.jit
def zeros(R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Returns the zero tiles with which the sums of a vector's gradient begin."""
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles += (tl.zeros((R, BLOCK), tl.float32),)
    return tiles


@triton.jit
def sums_of_rows(a, b):
    """Returns the sums of `a` and of `b` (R, BLOCK) over each row, each (R, 1), with one barrier for both."""
    a, b = tl.split(tl.sum(tl.join(a, b), 1))
    return a[:, None], b[:, None]


@triton.jit
def store_partial(P, sums, N: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Sums each tile of `sums` (R, BLOCK) over rows, and writes the result to this program's row of P (programs, N)."""
    for tile in tl.static_range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(P + tl.program_id(0).to(tl.int64) * N + at, tl.sum(sums[tile], 0)[None, :], mask=at < N)


def launch_forward(kernel: Any, rows: Tensor, *arguments: Any) -> None:
    """Launches `kernel(*tensors, T, eps)` over all rows of `rows` (T, N); `arguments` are the tensors, then eps."""
    tiling = row_tiling(rows.shape[1], rows.element_size(), backward=False)
    grid = -(-rows.shape[0] // tiling.rows)
    if grid:
        *tensors, eps = arguments
        _prepared(kernel, rows.shape[1], tiling).launch((grid,), tensors, (rows.shape[0], eps))


def launch_backward(kernel: Any, rows: Tensor, *arguments: Any, read: int, weights: int) -> list[Tensor]:
    """Launches `kernel(*tensors, *partials, T, eps)` over all rows of `rows` (T, N).

    Args: arguments: the tensors, then eps. read: the number of tensors (T, N) that the kernel reads. weights: the
    number of vectors (N,) that get a gradient.
    Returns: the gradients of these vectors, (N,) float32.
    """
    (count, width), itemsize = rows.shape, rows.element_size()
    tiling, limits = row_tiling(width, itemsize, backward=True), gpu.limits(rows.device)
    grid = programs(count, tiling.rows, limits.processors)
    partials = torch.empty(weights, grid, width, dtype=torch.float32, device=rows.device)
    if grid:
        *tensors, eps = arguments
        depth = stages(read * tiling.values * itemsize, limits.shared_bytes)
        _prepared(kernel, width, tiling, depth).launch((grid,), [*tensors, *partials.unbind()], (count, eps))
    return list(partials.sum(1).unbind())


@cache
def _prepared(kernel: Any, width: int, tiling: Tiling, depth: int | None = None) -> gpu.Prepared:
    """Returns the kernel for rows of `width` values. Args: depth: of a backward's pipeline."""
    pipeline = {} if depth is None else {"STAGES": depth}
    constants = {"N": width, "R": tiling.rows, "BLOCK": tiling.block, "TILES": tiling.tiles, **pipeline}
    return gpu.prepared(kernel, **constants, num_warps=tiling.warps)
