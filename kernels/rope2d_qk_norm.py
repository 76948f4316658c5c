"""2-D rotary embedding of q and k of one projection and RMSNorm over all their heads, forward and backward.

A rotation preserves the root mean square, so it is computed from the unrotated values, and one pass over q and k does
the rotation and the norm. The angles are computed in registers from a token's row and column; q and k and all heads in
a thread share the angles. v is a view of the projection. The forward saves the projection, the positions and the
weights. The backward is one pass, which reads q, k and the three gradients and writes the gradient of the projection,
including v.

Pair i of a head is its values i and i + K/2, see `kernels.reference.rope2d`. A tile is (R tokens, BLOCK heads, HALF
pairs). PIECES contains (first pair, HALF, BLOCK, tiles, tiles before) of each `kernels.tiling.Piece`. `rotations` is a
flat tuple with two entries per piece; `values`, `rotated`, `grads`, `weights` and `sums` have two entries per tile.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from univitar_ds.kernels import gpu
from univitar_ds.kernels.rows import sums_of_rows
from univitar_ds.kernels.tiling import HeadTiling, dense_rows, head_tiling, programs, stages

READ = 5
"""The number of tensors that the backward reads: q, k and the three gradients."""


@triton.jit
def sine_cosine(quarters):
    """Returns the sine and cosine of an angle in quarter turns. The truncated series have an error below 2^-24.

    It has no branch and takes angles of any size. libdevice has a branch for large angles, which needs local memory.
    """
    nearest = tl.floor(quarters + 0.5)
    rest = (quarters - nearest) * 1.5707963267948966  # within an eighth of a turn; the difference is exact
    z = rest * rest
    sine = rest + rest * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    quadrant = nearest.to(tl.int32)
    swapped = (quadrant & 1) != 0
    s = tl.where(swapped, cosine, sine)
    c = tl.where(swapped, sine, cosine)
    return tl.where((quadrant & 2) != 0, -s, s), tl.where(((quadrant + 1) & 2) != 0, -c, c)


@triton.jit
def sine_cosine_of(POSITIONS, token, T, slope, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr):
    """Returns the sines and cosines of a piece's pairs, each (R, 1, HALF).

    The angle of pair i is row * 2^(slope * i) for i < K/4, and column * 2^(slope * (i - K/4)) for the other pairs.
    """
    token = tl.reshape(token, (R,))  # positions are loaded as a vector: as (R, 1, 1) every register would load them
    row = tl.load(POSITIONS + 2 * token, mask=token < T, other=0).to(tl.float32)[:, None, None]
    column = tl.load(POSITIONS + 2 * token + 1, mask=token < T, other=0).to(tl.float32)[:, None, None]
    pair = PIECES[p][0] + tl.arange(0, PIECES[p][1])[None, None, :]
    of_rows = pair < K // 4
    frequency = tl.where(of_rows, pair, pair - K // 4).to(tl.float32)
    return sine_cosine(tl.where(of_rows, row, column) * tl.exp2(frequency * slope) * 0.6366197723675814)


@triton.jit
def place(token, tile, T, H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr):
    """Returns each pair's first value as an offset in the row, and the mask of the tile, both (R, BLOCK, HALF)."""
    FIRST: tl.constexpr = PIECES[p][0]
    HALF: tl.constexpr = PIECES[p][1]
    BLOCK: tl.constexpr = PIECES[p][2]
    head = tile * BLOCK + tl.arange(0, BLOCK)[None, :, None]
    pair = FIRST + tl.arange(0, HALF)[None, None, :]
    at = tl.broadcast_to(head * K + pair, (R, BLOCK, HALF))
    return at, (token < T) & (head < H) & (pair < K // 2)


@triton.jit
def load_heads(X, row, at, inside):
    return tl.load(X + row + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_heads(X, values, row, at, inside):
    tl.store(X + row + at, values.to(X.dtype.element_ty), mask=inside)


@triton.jit
def zero_tile(R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr):
    HALF: tl.constexpr = PIECES[p][1]
    BLOCK: tl.constexpr = PIECES[p][2]
    return tl.zeros((R, BLOCK, HALF), tl.float32)


@triton.jit
def flat(x, R: tl.constexpr):
    """Reshapes (R, BLOCK, HALF) to (R, BLOCK * HALF)."""
    return tl.reshape(x, (R, x.shape[1] * x.shape[2]))


@triton.jit
def read_piece(
    X, row, token, T, values, H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr
):  # fmt: skip
    """Returns `values` with a piece's pairs appended, and the sum of the squares of these pairs (R,)."""
    squares = zero_tile(R, PIECES, p)
    for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
        at, inside = place(token, tile, T, H, K, R, PIECES, p)
        first = load_heads(X, row, at, inside)
        second = load_heads(X, row, at + K // 2, inside)
        squares += first * first + second * second
        values += (first, second)
    return values, tl.sum(flat(squares, R), 1)


@triton.jit
def write_piece(
    Y, W, token, T, values, sin, cos,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    n: tl.constexpr = 2 * PIECES[p][4]
    for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
        at, inside = place(token, tile, T, H, K, R, PIECES, p)
        a = values[n + 2 * tile]
        b = values[n + 2 * tile + 1]
        first = a * cos - b * sin
        second = b * cos + a * sin
        if NORMED:
            first *= load_heads(W, 0, at, inside)
            second *= load_heads(W, 0, at + K // 2, inside)
        store_heads(Y, first, token * (H * K), at, inside)
        store_heads(Y, second, token * (H * K), at + K // 2, inside)


@triton.jit
def rotate_and_norm(
    X, W, Y, row, token, T, rotations, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Reads the heads of q (or of k) at X + row, and writes the rotated and normed heads to Y (T, H * K)."""
    values = ()
    square = tl.zeros((R,), tl.float32)
    for p in tl.static_range(len(PIECES)):
        values, part = read_piece(X, row, token, T, values, H, K, R, PIECES, p)
        square += part
    scale = tl.full((R, 1, 1), 1.0, tl.float32)
    if NORMED:
        scale = tl.rsqrt(square / (H * K) + eps)[:, None, None]
    for p in tl.static_range(len(PIECES)):
        sin = rotations[2 * p] * scale  # scaled once for all heads
        cos = rotations[2 * p + 1] * scale
        write_piece(Y, W, token, T, values, sin, cos, H, K, R, PIECES, p, NORMED)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    QKV, POSITIONS, WQ, WK, Q, KEYS, T, slope, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None, None]
    row = token * (3 * H * K)
    rotations = ()
    for p in tl.static_range(len(PIECES)):
        sin, cos = sine_cosine_of(POSITIONS, token, T, slope, K, R, PIECES, p)
        rotations += (sin, cos)
    rotate_and_norm(QKV, WQ, Q, row, token, T, rotations, eps, H, K, R, PIECES, Q_NORMED)
    rotate_and_norm(QKV + H * K, WK, KEYS, row, token, T, rotations, eps, H, K, R, PIECES, K_NORMED)


@triton.jit
def vectors(W, H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, WANTED: tl.constexpr):
    """Returns the tiles that a backward program keeps during its loop: of the weight W, or zeros if W is None.

    The tuple is empty if WANTED is false.
    """
    tiles = ()
    if WANTED:
        for p in tl.static_range(len(PIECES)):
            for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
                if W is None:
                    tiles += (zero_tile(R, PIECES, p), zero_tile(R, PIECES, p))
                else:
                    at, inside = place(tl.zeros((R, 1, 1), tl.int64), tile, 1, H, K, R, PIECES, p)
                    first = tl.load(W + at, mask=inside, other=0.0)
                    tiles += (first, tl.load(W + at + K // 2, mask=inside, other=0.0))
    return tiles


@triton.jit
def read_grads(
    X, DY, row, grad_row, token, T, weights, rotated, grads, sin, cos,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Returns `rotated` and `grads` with a piece's rotated values and gradients appended, and two sums, each (R, 1).

    The first sum is of the squares of the values, the second of value * gradient * weight.
    """
    n: tl.constexpr = 2 * PIECES[p][4]
    squares = zero_tile(R, PIECES, p)
    dots = zero_tile(R, PIECES, p)
    for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
        at, inside = place(token, tile, T, H, K, R, PIECES, p)
        g_first = load_heads(DY, grad_row, at, inside)
        g_second = load_heads(DY, grad_row, at + K // 2, inside)
        if NORMED:
            a = load_heads(X, row, at, inside)
            b = load_heads(X, row, at + K // 2, inside)
            squares += a * a + b * b
            first = a * cos - b * sin
            second = b * cos + a * sin
            dots += first * g_first * weights[n + 2 * tile].to(tl.float32)
            dots += second * g_second * weights[n + 2 * tile + 1].to(tl.float32)
            rotated += (first, second)
        grads += (g_first, g_second)
    square, dot = sums_of_rows(flat(squares, R), flat(dots, R))
    return rotated, grads, square, dot


@triton.jit
def write_grads(
    DX, row, token, T, weights, rotated, grads, sums, new_sums, sin, cos, scale, pull,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, p: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Writes a piece's gradient. Returns `new_sums` with the running sums of the weight's gradient appended.

    The running sums of a tile are its entries of `sums` plus this round's part.
    """
    n: tl.constexpr = 2 * PIECES[p][4]
    sin *= scale
    cos *= scale
    for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
        at, inside = place(token, tile, T, H, K, R, PIECES, p)
        first = grads[n + 2 * tile]
        second = grads[n + 2 * tile + 1]
        if NORMED:
            a = rotated[n + 2 * tile]
            b = rotated[n + 2 * tile + 1]
            new_sums += (sums[n + 2 * tile] + first * a * scale, sums[n + 2 * tile + 1] + second * b * scale)
            first = first * weights[n + 2 * tile].to(tl.float32) - a * pull
            second = second * weights[n + 2 * tile + 1].to(tl.float32) - b * pull
        store_heads(DX, first * cos + second * sin, row, at, inside)
        store_heads(DX, second * cos - first * sin, row, at + K // 2, inside)
    return new_sums


@triton.jit
def rotate_back(
    X, DY, DX, row, grad_row, token, T, rotations, weights, sums, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of q (or of k) to DX + row. Returns the running sums of the weight's gradient."""
    rotated = ()
    grads = ()
    square = tl.zeros((R, 1), tl.float32)
    dot = tl.zeros((R, 1), tl.float32)
    for p in tl.static_range(len(PIECES)):
        rotated, grads, square_part, dot_part = read_grads(
            X, DY, row, grad_row, token, T, weights, rotated, grads, rotations[2 * p], rotations[2 * p + 1],
            H, K, R, PIECES, p, NORMED,
        )  # fmt: skip
        square += square_part
        dot += dot_part
    scale = tl.full((R, 1, 1), 1.0, tl.float32)
    pull = tl.zeros((R, 1, 1), tl.float32)
    if NORMED:
        scale = tl.rsqrt(square / (H * K) + eps)[:, :, None]
        pull = dot[:, :, None] / (H * K) * scale * scale
    new_sums = ()
    for p in tl.static_range(len(PIECES)):
        new_sums = write_grads(
            DX, row, token, T, weights, rotated, grads, sums, new_sums, rotations[2 * p], rotations[2 * p + 1],
            scale, pull, H, K, R, PIECES, p, NORMED,
        )  # fmt: skip
    return new_sums


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    QKV, POSITIONS, WQ, WK, DQ, DK, DV, DQKV, PARTIAL, dq_row, dk_row, dv_row, T, slope, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    q_weights = vectors(WQ, H, K, R, PIECES, Q_NORMED)
    k_weights = vectors(WK, H, K, R, PIECES, K_NORMED)
    q_sums = vectors(None, H, K, R, PIECES, Q_NORMED)
    k_sums = vectors(None, H, K, R, PIECES, K_NORMED)
    for start in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R, num_stages=STAGES):
        token = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None, None]
        row = token * (3 * H * K)
        rotations = ()
        for p in tl.static_range(len(PIECES)):
            sin, cos = sine_cosine_of(POSITIONS, token, T, slope, K, R, PIECES, p)
            rotations += (sin, cos)
        q_sums = rotate_back(
            QKV, DQ, DQKV, row, token * dq_row, token, T, rotations, q_weights, q_sums, eps,
            H, K, R, PIECES, Q_NORMED,
        )  # fmt: skip
        k_sums = rotate_back(
            QKV + H * K, DK, DQKV + H * K, row, token * dk_row, token, T, rotations, k_weights, k_sums, eps,
            H, K, R, PIECES, K_NORMED,
        )  # fmt: skip
        for p in tl.static_range(len(PIECES)):
            for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
                at, inside = place(token, tile, T, H, K, R, PIECES, p)
                for half in tl.static_range(2):
                    values = tl.load(DV + token * dv_row + at + half * (K // 2), mask=inside)
                    tl.store(DQKV + 2 * H * K + row + at + half * (K // 2), values, mask=inside)
    if Q_NORMED:
        store_sums(PARTIAL, q_sums, H, K, PIECES)
    if K_NORMED:
        store_sums(PARTIAL + H * K, k_sums, H, K, PIECES)


@triton.jit
def store_sums(PARTIAL, sums, H: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr):
    """Sums each tile of `sums` over its R rows, and writes the result to this program's row of PARTIAL.

    PARTIAL (programs, 2, H * K) starts at the half of q, or of k.
    """
    row = tl.program_id(0).to(tl.int64) * (2 * H * K)
    for p in tl.static_range(len(PIECES)):
        for tile in tl.static_range(tl.constexpr(PIECES[p][3])):
            at, inside = place(tl.zeros((1, 1, 1), tl.int64), tile, 1, H, K, 1, PIECES, p)
            for half in tl.static_range(2):
                total = tl.sum(sums[2 * (PIECES[p][4] + tile) + half], 0)[None, :, :]
                store_heads(PARTIAL, total, row, at + half * (K // 2), inside)


def launch_forward(qkv, positions, weights, theta: float, eps: float) -> tuple[Tensor, Tensor]:
    count, _, heads, width = qkv.shape
    q, k = (torch.empty(count, heads, width, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    tiling = head_tiling(heads, width, qkv.element_size(), backward=False)
    grid = -(-count // tiling.rows)
    if grid:
        kernel = _prepared(forward_kernel, heads, width, tiling, *(w is not None for w in weights))
        kernel.launch((grid,), (qkv, positions, *weights, q, k), (count, _slope(theta, width), eps))
    return q, k


def launch_backward(qkv, positions, weights, grads, theta: float, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the projection (T, 3, H, K), in its dtype, and of both weights (2, H * K), float32."""
    count, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv)
    tiling, limits = head_tiling(heads, width, qkv.element_size(), backward=True), gpu.limits(qkv.device)
    grid = programs(count, tiling.rows, limits.processors)
    partials = torch.empty(grid, 2, heads * width, dtype=torch.float32, device=qkv.device)
    if grid:
        depth = stages(READ * tiling.values * qkv.element_size(), limits.shared_bytes)
        kernel = _prepared(backward_kernel, heads, width, tiling, *(w is not None for w in weights), depth)
        tensors = (qkv, positions, *weights, *grads, dqkv, partials)
        kernel.launch((grid,), tensors, (*(grad.stride(0) for grad in grads), count, _slope(theta, width), eps))
    return dqkv, partials.sum(0)


def _slope(theta: float, width: int) -> float:
    """Returns `slope`: plane i of the K/4 planes of an axis rotates by 2^(slope * i) = theta^(-4i / K) per cell."""
    return -math.log2(theta) * 4 / width


@cache
def _prepared(
    kernel, heads: int, width: int, tiling: HeadTiling, q_normed: bool, k_normed: bool, depth: int | None = None
) -> gpu.Prepared:
    """Returns the kernel for rows of `heads` heads of `width` values. Args: depth: of the backward's pipeline."""
    pipeline = {} if depth is None else {"STAGES": depth}
    constants = {"H": heads, "K": width, "R": tiling.rows, "PIECES": tiling.pieces}
    return gpu.prepared(kernel, **constants, Q_NORMED=q_normed, K_NORMED=k_normed, **pipeline, num_warps=tiling.warps)


class Rope2dQkNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, positions, q_weight, k_weight, theta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        qkv, positions = qkv.contiguous(), positions.contiguous()
        ctx.save_for_backward(qkv, positions, q_weight, k_weight)
        ctx.theta, ctx.eps = theta, eps
        return *launch_forward(qkv, positions, (q_weight, k_weight), theta, eps), qkv[:, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, positions, *weights = ctx.saved_tensors
        dqkv, sums = launch_backward(qkv, positions, weights, [dense_rows(g) for g in grads], ctx.theta, ctx.eps)
        dweights = [None if w is None else total.to(w.dtype) for w, total in zip(weights, sums, strict=True)]
        return dqkv, None, *dweights, None, None


def rope2d_qk_norm(
    qkv: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, theta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `kernels.reference.rope2d_qk_norm` on a GPU."""
    return Rope2dQkNorm.apply(qkv, positions, q_weight, k_weight, theta, eps)
