"""Residual sum with LayerScale and RMSNorm of the sum, forward and backward.

The forward saves the sum, the branch, and the vectors of LayerScale and RMSNorm for the backward.
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
def forward_kernel(
    X, BRANCH, S, W, SUM, Y, T, eps, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    totals = ()
    squares = tl.zeros((R, BLOCK), tl.float32)
    for tile in tl.static_range(TILES):
        at = tile * BLOCK + lane
        total = load_rows(X, row, at, T, N) + load_rows(BRANCH, row, at, T, N) * load_vector(S, at, N, R)
        # The norm uses the stored, rounded sum, as in the backward.
        total = total.to(SUM.dtype.element_ty).to(tl.float32)
        store_rows(SUM, total, row, at, T, N)
        squares += total * total
        totals += (total,)
    scale = tl.rsqrt(tl.sum(squares, 1) / N + eps)[:, None]
    for tile in tl.static_range(TILES):
        at = tile * BLOCK + lane
        store_rows(Y, totals[tile] * scale * load_vector(W, at, N, R), row, at, T, N)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    SUM, BRANCH, S, W, DSUM, DY, DX, DBRANCH, DS, DW, T, eps,
    N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)[None, :]
    scales = held_vector(S, N, R, BLOCK, TILES)
    weights = held_vector(W, N, R, BLOCK, TILES)
    scale_sums = zeros(R, BLOCK, TILES)
    weight_sums = zeros(R, BLOCK, TILES)
    for start in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R, num_stages=STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None]
        totals = ()
        gs = ()
        squares = tl.zeros((R, BLOCK), tl.float32)
        dots = tl.zeros((R, BLOCK), tl.float32)
        for tile in tl.static_range(TILES):
            total = load_rows(SUM, row, tile * BLOCK + lane, T, N)
            g = load_rows(DY, row, tile * BLOCK + lane, T, N)
            squares += total * total
            dots += total * g * weights[tile].to(tl.float32)
            totals += (total,)
            gs += (g,)
        square, dot = sums_of_rows(squares, dots)
        scale = tl.rsqrt(square / N + eps)
        pull = dot / N * scale * scale
        new_scale_sums = ()
        new_weight_sums = ()
        for tile in tl.static_range(TILES):
            at = tile * BLOCK + lane
            dx = (gs[tile] * weights[tile].to(tl.float32) - totals[tile] * pull) * scale
            dx += load_rows(DSUM, row, at, T, N)
            store_rows(DX, dx, row, at, T, N)
            store_rows(DBRANCH, dx * scales[tile].to(tl.float32), row, at, T, N)
            new_scale_sums += (scale_sums[tile] + dx * load_rows(BRANCH, row, at, T, N),)
            new_weight_sums += (weight_sums[tile] + gs[tile] * totals[tile] * scale,)
        scale_sums = new_scale_sums
        weight_sums = new_weight_sums
    store_partial(DS, scale_sums, N, BLOCK, TILES)
    store_partial(DW, weight_sums, N, BLOCK, TILES)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, branch = x.contiguous(), branch.contiguous()
        total, y = torch.empty_like(x), torch.empty_like(x)
        launch_forward(forward_kernel, x, x, branch, scale, weight, total, y, eps)
        ctx.save_for_backward(total, branch, scale, weight)
        ctx.eps = eps
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        total, branch, scale, weight = ctx.saved_tensors
        dx, dbranch = torch.empty_like(total), torch.empty_like(branch)
        grads = dtotal.contiguous(), dy.contiguous()
        dscale, dweight = launch_backward(
            backward_kernel, total, total, branch, scale, weight, *grads, dx, dbranch, ctx.eps, read=4, weights=2
        )
        return dx, dbranch, dscale.to(scale.dtype), dweight.to(weight.dtype), None


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes `kernels.reference.add_norm` on a GPU."""
    return AddNorm.apply(x, branch, scale, weight, eps)
