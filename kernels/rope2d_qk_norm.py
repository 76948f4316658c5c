"""2-D rotary embedding of q and k out of one projection and RMSNorm over all their heads, forward and backward.

A rotation keeps the norm, so the norm's scale comes from the values as they are read, and one pass over q and k does
both. The angles are made in registers from a token's row and column; q and k and all heads that a thread holds share
them. v is a view of the projection. Saved for the backward: the projection, positions and weights; its one pass reads
q, k and the three gradients, and writes the gradient of the whole projection, that of v included.

A tile is (R tokens, BLOCK heads, HALF pairs); pair i of a head is its values i and i + K/2, see
`kernels.reference.rope2d`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.rows import sums_of_rows
from kernels.tiling import dense_rows, head_tiling, programs


@triton.jit
def sine_cosine(quarters):
    """Sine and cosine of an angle in quarter turns, each within 2^-24 (terms of the series that are left out).

    For angles of any size without a branch: libdevice has one for large angles, which takes local memory.
    """
    whole = tl.floor(quarters + 0.5)
    part = (quarters - whole) * 1.5707963267948966  # within an eighth of a turn; the difference is exact
    z = part * part
    sine = part + part * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    cosine = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    quadrant = whole.to(tl.int32)
    swapped = (quadrant & 1) != 0
    s = tl.where(swapped, cosine, sine)
    c = tl.where(swapped, sine, cosine)
    return tl.where((quadrant & 2) != 0, -s, s), tl.where(((quadrant + 1) & 2) != 0, -c, c)


@triton.jit
def sine_cosine_of(POSITIONS, token, pair, T, slope, K: tl.constexpr):
    """Of every pair of the tokens, (R, 1, HALF): row * 2^(slope * i), columns for the second half of the pairs."""
    row = tl.load(POSITIONS + 2 * token, mask=token < T, other=0).to(tl.float32)
    column = tl.load(POSITIONS + 2 * token + 1, mask=token < T, other=0).to(tl.float32)
    of_rows = pair < K // 4
    plane = tl.where(of_rows, pair, pair - K // 4).to(tl.float32)
    return sine_cosine(tl.where(of_rows, row, column) * tl.exp2(plane * slope) * 0.6366197723675814)


@triton.jit
def load_heads(X, row, at, inside):
    return tl.load(X + row + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_heads(X, values, row, at, inside):
    tl.store(X + row + at, values.to(X.dtype.element_ty), mask=inside)


@triton.jit
def load_weight(W, at, inside):
    """(R, BLOCK, HALF) out of a vector, for every token by the threads that need it."""
    return tl.load(W + tl.broadcast_to(at, inside.shape), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turn_and_norm(
    X, W, Y, row, token, cos, sin, head, pair, T, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """One of q and k: reads its heads of the projection at X + row, writes them to Y (T, H * K)."""
    firsts = ()
    seconds = ()
    squares = tl.zeros((R, BLOCK, HALF), tl.float32)
    for tile in tl.static_range(TILES):
        at = (tile * BLOCK + head) * K + pair
        inside = (token < T) & (tile * BLOCK + head < H) & (pair < K // 2)
        first = load_heads(X, row, at, inside)
        second = load_heads(X, row, at + K // 2, inside)
        squares += first * first + second * second
        firsts += (first,)
        seconds += (second,)
    scale = tl.full((R, 1, 1), 1.0, tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(tl.reshape(squares, (R, BLOCK * HALF)), 1) / (H * K) + eps)[:, None, None]
    for tile in tl.static_range(TILES):
        at = (tile * BLOCK + head) * K + pair
        inside = (token < T) & (tile * BLOCK + head < H) & (pair < K // 2)
        first = (firsts[tile] * cos - seconds[tile] * sin) * scale
        second = (seconds[tile] * cos + firsts[tile] * sin) * scale
        if NORMED:
            first *= load_weight(W, at, inside)
            second *= load_weight(W, at + K // 2, inside)
        store_heads(Y, first, token * (H * K), at, inside)
        store_heads(Y, second, token * (H * K), at + K // 2, inside)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    QKV, POSITIONS, WQ, WK, Q, KEYS, T, slope, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None, None]
    head = tl.arange(0, BLOCK)[None, :, None]
    pair = tl.arange(0, HALF)[None, None, :]
    row = token * (3 * H * K)
    sin, cos = sine_cosine_of(POSITIONS, token, pair, T, slope, K)
    turn_and_norm(QKV, WQ, Q, row, token, cos, sin, head, pair, T, eps, H, K, R, BLOCK, TILES, HALF, Q_NORMED)
    turn_and_norm(
        QKV + H * K, WK, KEYS, row, token, cos, sin, head, pair, T, eps, H, K, R, BLOCK, TILES, HALF, K_NORMED
    )


@triton.jit
def turn_back(
    X, W, DY, DX, row, grad_row, token, cos, sin, head, pair, T, eps, sums,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    """One of q and k: writes its part of the projection's gradient to DX + row; `sums` and its weight's gradient."""
    turned = ()
    grads = ()
    squares = tl.zeros((R, BLOCK, HALF), tl.float32)
    dots = tl.zeros((R, BLOCK, HALF), tl.float32)
    for tile in tl.static_range(TILES):
        at = (tile * BLOCK + head) * K + pair
        inside = (token < T) & (tile * BLOCK + head < H) & (pair < K // 2)
        g_first = load_heads(DY, grad_row, at, inside)
        g_second = load_heads(DY, grad_row, at + K // 2, inside)
        if NORMED:
            a = load_heads(X, row, at, inside)
            b = load_heads(X, row, at + K // 2, inside)
            squares += a * a + b * b
            first = a * cos - b * sin
            second = b * cos + a * sin
            dots += first * g_first * load_weight(W, at, inside)
            dots += second * g_second * load_weight(W, at + K // 2, inside)
            turned += (first, second)
        grads += (g_first, g_second)
    if NORMED:
        width: tl.constexpr = BLOCK * HALF
        square, dot = sums_of_rows(tl.reshape(squares, (R, width)), tl.reshape(dots, (R, width)))
        scale = tl.rsqrt(square / (H * K) + eps)[:, :, None]
        pull = dot[:, :, None] / (H * K) * scale * scale
    more = ()
    for tile in tl.static_range(TILES):
        at = (tile * BLOCK + head) * K + pair
        inside = (token < T) & (tile * BLOCK + head < H) & (pair < K // 2)
        first = grads[2 * tile]
        second = grads[2 * tile + 1]
        if NORMED:
            more += (sums[2 * tile] + first * turned[2 * tile] * scale,)
            more += (sums[2 * tile + 1] + second * turned[2 * tile + 1] * scale,)
            first = (first * load_weight(W, at, inside) - turned[2 * tile] * pull) * scale
            second = (second * load_weight(W, at + K // 2, inside) - turned[2 * tile + 1] * pull) * scale
        store_heads(DX, first * cos + second * sin, row, at, inside)
        store_heads(DX, second * cos - first * sin, row, at + K // 2, inside)
    return more


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    QKV, POSITIONS, WQ, WK, DQ, DK, DV, DQKV, PARTIAL, dq_row, dk_row, dv_row, T, slope, eps,
    H: tl.constexpr, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, HALF: tl.constexpr,
    Q_NORMED: tl.constexpr, K_NORMED: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, BLOCK)[None, :, None]
    pair = tl.arange(0, HALF)[None, None, :]
    q_sums = zero_sums(R, BLOCK, HALF, 2 * TILES if Q_NORMED else 0)
    k_sums = zero_sums(R, BLOCK, HALF, 2 * TILES if K_NORMED else 0)
    for start in tl.range(tl.program_id(0) * R, T, tl.num_programs(0) * R):
        token = tl.cast(start, tl.int64) + tl.arange(0, R)[:, None, None]
        row = token * (3 * H * K)
        sin, cos = sine_cosine_of(POSITIONS, token, pair, T, slope, K)
        q_sums = turn_back(
            QKV, WQ, DQ, DQKV, row, token * dq_row, token, cos, sin, head, pair, T, eps, q_sums,
            H, K, R, BLOCK, TILES, HALF, Q_NORMED,
        )  # fmt: skip
        k_sums = turn_back(
            QKV + H * K, WK, DK, DQKV + H * K, row, token * dk_row, token, cos, sin, head, pair, T, eps, k_sums,
            H, K, R, BLOCK, TILES, HALF, K_NORMED,
        )  # fmt: skip
        for tile in tl.static_range(TILES):
            for second in tl.static_range(2):
                at = (tile * BLOCK + head) * K + pair + second * (K // 2)
                inside = (token < T) & (tile * BLOCK + head < H) & (pair < K // 2)
                dv = tl.load(DV + token * dv_row + at, mask=inside)
                tl.store(DQKV + 2 * H * K + row + at, dv, mask=inside)
    if Q_NORMED:
        store_sums(PARTIAL, q_sums, head, pair, H, K, BLOCK, TILES)
    if K_NORMED:
        store_sums(PARTIAL + H * K, k_sums, head, pair, H, K, BLOCK, TILES)


@triton.jit
def zero_sums(R: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, COUNT: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((R, BLOCK, HALF), tl.float32),)
    return sums


@triton.jit
def store_sums(PARTIAL, sums, head, pair, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Sums over this program's tokens into its row of PARTIAL (programs, 2, H * K)."""
    row = tl.program_id(0).to(tl.int64) * (2 * H * K)
    for tile in tl.static_range(TILES):
        at = (tile * BLOCK + head) * K + pair
        inside = (tile * BLOCK + head < H) & (pair < K // 2)
        store_heads(PARTIAL, tl.sum(sums[2 * tile], 0)[None, :, :], row, at, inside)
        store_heads(PARTIAL, tl.sum(sums[2 * tile + 1], 0)[None, :, :], row, at + K // 2, inside)


def launch_forward(qkv, positions, weights, theta: float, eps: float) -> tuple[Tensor, Tensor]:
    count, _, heads, width = qkv.shape
    q, k = (torch.empty(count, heads, width, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    tiling = head_tiling(heads, width, qkv.element_size(), backward=False)
    grid = -(-count // tiling.rows)
    if grid:
        slope = _slope(theta, width)
        forward_kernel[(grid,)](qkv, positions, *weights, q, k, count, slope, eps, **_options(qkv, weights, tiling))
    return q, k


def launch_backward(qkv, positions, weights, grads, theta: float, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of the projection and of both weights, (T, 3, H, K) and (2, H * K) float32."""
    count, _, heads, width = qkv.shape
    dqkv = torch.empty_like(qkv)
    tiling = head_tiling(heads, width, qkv.element_size(), backward=True)
    grid = programs(count, tiling, qkv.device)
    partials = torch.empty(grid, 2, heads * width, dtype=torch.float32, device=qkv.device)
    if grid:
        backward_kernel[(grid,)](
            qkv, positions, *weights, *grads, dqkv, partials, *(grad.stride(0) for grad in grads), count,
            _slope(theta, width), eps, **_options(qkv, weights, tiling),
        )  # fmt: skip
    return dqkv, partials.sum(0)


def _slope(theta: float, width: int) -> float:
    """Plane i of the K/4 of an axis turns by 2^(slope * i) a cell: theta^(-2i / (K/2))."""
    return -math.log2(theta) * 4 / width


def _options(qkv: Tensor, weights, tiling) -> dict[str, int]:
    heads, width = qkv.shape[2:]
    return {
        "H": heads, "K": width, "R": tiling.rows, "BLOCK": tiling.block, "TILES": tiling.tiles,
        "HALF": triton.next_power_of_2(width // 2), "Q_NORMED": weights[0] is not None,
        "K_NORMED": weights[1] is not None, "num_warps": tiling.warps,
    }  # fmt: skip


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
    """See `kernels.reference.rope2d_qk_norm`; on a GPU."""
    return Rope2dQkNorm.apply(qkv, positions, q_weight, k_weight, theta, eps)
