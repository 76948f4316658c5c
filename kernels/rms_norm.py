"""RMSNorm of rows, forward and backward.

The forward saves x and the weight; the backward recomputes the scale of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from univitar_ds.kernels.rows import (
    held_vector,
    launch_backward,
    launch_forward,
    load_rows,
    load_vector,
    store_partial,
    store_rows,
    sums_of_rows,
    zeros,
)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(X, W, Y, T, eps, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    xs = ()
    squares = tl.zeros((R, BLOCK), tl.float32)
    for tile in tl.static_range(TILES):
        x = load_rows(X, row, tile * BLOCK + lane, T, N)
        squares += x * x
        xs += (x,)
    scale = tl.rsqrt(tl.sum(squares, 1) / N + eps)[:, None]
    for tile in tl.static_range(TILES):
        at = tile * BLOCK + lane
        store_rows(Y, xs[tile] * scale * load_vector(W, at, N, R), row, at, T, N)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    X, W, DY, DX, DW, T, eps, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)[None, :]
    weights = held_vector(W, N, R, BLOCK, TILES)
    sums = zeros(R, BLOCK, TILES)
    for start in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R, num_stages=STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None]
        xs = ()
        gs = ()
        squares = tl.zeros((R, BLOCK), tl.float32)
        dots = tl.zeros((R, BLOCK), tl.float32)
        for tile in tl.static_range(TILES):
            x = load_rows(X, row, tile * BLOCK + lane, T, N)
            g = load_rows(DY, row, tile * BLOCK + lane, T, N)
            squares += x * x
            dots += x * g * weights[tile].to(tl.float32)
            xs += (x,)
            gs += (g,)
        square, dot = sums_of_rows(squares, dots)
        scale = tl.rsqrt(square / N + eps)
        pull = dot / N * scale * scale
        new_sums = ()
        for tile in tl.static_range(TILES):
            at = tile * BLOCK + lane
            dx = (gs[tile] * weights[tile].to(tl.float32) - xs[tile] * pull) * scale
            store_rows(DX, dx, row, at, T, N)
            new_sums += (sums[tile] + gs[tile] * xs[tile] * scale,)
        sums = new_sums
    store_partial(DW, sums, N, BLOCK, TILES)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        launch_forward(forward_kernel, x, x, weight, y, eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x)
        (dweight,) = launch_backward(backward_kernel, x, x, weight, dy.contiguous(), dx, ctx.eps, read=2, weights=1)
        return dx, dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `kernels.reference.rms_norm` on a GPU; x is (..., N)."""
    return RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)
