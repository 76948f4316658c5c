"""RMSNorm(silu(gate) * up), forward and backward.

The forward saves gate, up and the weight. The backward recomputes the product, which costs less than reading it.
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


@triton.jit
def sigmoid(x):
    """Returns 1 / (1 + e^-x) with an error below 2^-21.

    It is the square of a reciprocal root, since a division needs four times as many instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit(do_not_specialize=["T"])
def forward_kernel(GATE, UP, W, Y, T, eps, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    products = ()
    squares = tl.zeros((R, BLOCK), tl.float32)
    for tile in tl.static_range(TILES):
        gate = load_rows(GATE, row, tile * BLOCK + lane, T, N)
        product = gate * sigmoid(gate) * load_rows(UP, row, tile * BLOCK + lane, T, N)
        squares += product * product
        products += (product,)
    scale = tl.rsqrt(tl.sum(squares, 1) / N + eps)[:, None]
    for tile in tl.static_range(TILES):
        at = tile * BLOCK + lane
        store_rows(Y, products[tile] * scale * load_vector(W, at, N, R), row, at, T, N)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    GATE, UP, W, DY, DGATE, DUP, DW, T, eps,
    N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)[None, :]
    weights = held_vector(W, N, R, BLOCK, TILES)
    sums = zeros(R, BLOCK, TILES)
    for start in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R, num_stages=STAGES):
        row = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None]
        gates = ()
        ups = ()
        gs = ()
        squares = tl.zeros((R, BLOCK), tl.float32)
        dots = tl.zeros((R, BLOCK), tl.float32)
        for tile in tl.static_range(TILES):
            at = tile * BLOCK + lane
            gate = load_rows(GATE, row, at, T, N)
            up = load_rows(UP, row, at, T, N)
            g = load_rows(DY, row, at, T, N)
            product = gate * sigmoid(gate) * up
            squares += product * product
            dots += product * g * weights[tile].to(tl.float32)
            gates += (gate,)
            ups += (up,)
            gs += (g,)
        square, dot = sums_of_rows(squares, dots)
        scale = tl.rsqrt(square / N + eps)
        pull = dot / N * scale * scale
        new_sums = ()
        for tile in tl.static_range(TILES):
            at = tile * BLOCK + lane
            gate_sigmoid = sigmoid(gates[tile])
            silu = gates[tile] * gate_sigmoid
            product = silu * ups[tile]
            dproduct = (gs[tile] * weights[tile].to(tl.float32) - product * pull) * scale
            store_rows(DUP, dproduct * silu, row, at, T, N)
            store_rows(DGATE, dproduct * ups[tile] * (gate_sigmoid + silu * (1.0 - gate_sigmoid)), row, at, T, N)
            new_sums += (sums[tile] + gs[tile] * product * scale,)
        sums = new_sums
    store_partial(DW, sums, N, BLOCK, TILES)


class SwiGLUNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        launch_forward(forward_kernel, gate, gate, up, weight, y, eps)
        ctx.save_for_backward(gate, up, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        (dweight,) = launch_backward(
            backward_kernel, gate, gate, up, weight, dy.contiguous(), dgate, dup, ctx.eps, read=3, weights=1
        )
        return dgate, dup, dweight.to(weight.dtype), None


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `kernels.reference.swiglu_norm` on a GPU."""
    return SwiGLUNorm.apply(gate, up, weight, eps)
