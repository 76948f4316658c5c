"""Every fused operation in plain torch: the reference for kernels and tests.

Unless a docstring says otherwise, arithmetic is in float32 for half-precision inputs and in the input's precision for
other inputs, and results have the dtype of the input. Shapes use these letters:
    T tokens of a pack      H heads     K head width    D = H * K hidden width
    F feed-forward width    B pixel bytes of a pack     1176 = 3 channels * 2 frames * 14 * 14 pixels
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PATCH = 14
TUBELET = 2
CHANNELS = 3
PATCH_VALUES = CHANNELS * TUBELET * PATCH * PATCH
CENTRE = 128
"""Subtracted from every byte. The differences are exact in bfloat16, and their maximum magnitude is 128 instead of 255,
which halves the errors that rounded weights cause in the products."""
BATCH = 2048
"""Number of still-image tokens (twice that of video tokens) in one matrix product, so that they fit into CPU caches."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes RMSNorm over the last dimension; the mean of squares and the scaling are in float32 or wider."""
    return F.rms_norm(x.to(_wide(x)), weight.shape, weight.to(_wide(x)), eps).to(x.dtype)


def rope2d(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Applies the 2D rotary position embedding in the rotate-half layout of the UniViTAR release.

    A head of K values has K/2 planes (i, i + K/2). Plane j of the first K/4 planes is rotated by
    row * theta^(-2j/(K/2)), and plane j of the other K/4 planes by column * theta^(-2j/(K/2)). The temporal position
    has no effect.

    Args: x (T, H, K) with K divisible by 4; positions (T, 2) integer rows and columns.
    Returns: (T, H, K) in float32 or wider.
    """
    half, wide = x.shape[-1] // 2, _wide(x)
    angles = rope2d_angles(positions, x.shape[-1], theta, wide)[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(wide).split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope2d_angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Returns the rotation angle of each plane of a head of `width` = K values: (T, 2) -> (T, K/2), in `dtype`."""
    half = width // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=dtype) / half
    return (positions.to(dtype)[:, :, None] * theta**-exponents).flatten(1)


def rope2d_norm(x: Tensor, positions: Tensor, weight: Tensor | None, *, theta: float, eps: float) -> Tensor:
    """Computes the rotary embedding, then RMSNorm over all heads together (not per head); no norm without `weight`.

    Args: x (T, H, K); positions (T, 2) integers; weight (H * K,) or None.
    Returns: (T, H, K) in the dtype of x.
    """
    rotated = rope2d(x, positions, theta)
    if weight is not None:
        rotated = rms_norm(rotated.flatten(1), weight, eps).view_as(x)
    return rotated.to(x.dtype)


def rope2d_qk_norm(
    qkv: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, theta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `rope2d_norm` of the queries and keys of one projection; the values are returned unchanged.

    Args: qkv (T, 3, H, K); positions (T, 2) integers; weights (H * K,) or None.
    Returns: q, k, v, each (T, H, K).
    """
    q, k, v = qkv.unbind(1)
    return (
        rope2d_norm(q, positions, q_weight, theta=theta, eps=eps),
        rope2d_norm(k, positions, k_weight, theta=theta, eps=eps),
        v,
    )


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes RMSNorm(silu(gate) * up): (T, F), (T, F) -> (T, F)."""
    wide = _wide(gate)
    return rms_norm(F.silu(gate.to(wide)) * up.to(wide), weight, eps).to(gate.dtype)


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes the residual sum with LayerScale, and the RMSNorm of the sum for the next branch.

    Args: x, branch (T, D); scale, weight (D,).
    Returns: the sum x + scale * branch, and the RMSNorm of the sum, both (T, D).
    """
    total = torch.addcmul(x, branch, scale)
    return total, rms_norm(total, weight, eps)


def patchify(pixels: Tensor, frames: Sequence[int], grid_thw: Sequence[tuple[int, int, int]], merge: int) -> Tensor:
    """Cuts packed images and videos into the rows of the patch embedding's input, without padding.

    Args:
        pixels: (B,) uint8, the items one after another; item i has `frames[i]` frames (h * 14, w * 14, 3), row by row.
        frames: number of stored frames per item. An item of one frame is a still image; the frame is used twice.
        grid_thw: number of tokens per item along time, height, width.
        merge: tokens are in blocks of merge x merge neighbours: order (t, h/merge, w/merge, merge, merge).
    Returns: (T, 1176) uint8, each row ordered (channel, frame, row, column).
    Raises: ValueError as `check_frames`.
    """
    patches = pixels.new_empty(check_frames(pixels, frames, grid_thw), PATCH_VALUES)
    byte = token = 0
    for count, (t, h, w) in zip(frames, grid_thw, strict=True):
        size, tokens = count * h * w * PATCH * PATCH * CHANNELS, t * h * w
        video = pixels[byte : byte + size].view(count, h // merge, merge, PATCH, w // merge, merge, PATCH, CHANNELS)
        cells = video.expand(TUBELET * t, *video.shape[1:]).unflatten(0, (t, TUBELET))
        rows = patches[token : token + tokens]
        rows.view(t, h // merge, w // merge, merge, merge, CHANNELS, TUBELET, PATCH, PATCH).copy_(
            cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        )
        byte, token = byte + size, token + tokens
    return patches


def normalise(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Computes (x / 255 - mean) / std per channel: (T, 1176) uint8 -> (T, 1176) float32."""
    values = patches.to(torch.float32).div_(255).unflatten(1, (CHANNELS, -1))
    shift, scale = (torch.tensor(v, dtype=torch.float32, device=patches.device)[:, None] for v in (mean, std))
    return values.sub_(shift).div_(scale).flatten(1)


def patch_embed(
    pixels: Tensor,
    frames: Sequence[int],
    grid_thw: Sequence[Sequence[int]],
    weight: Tensor,
    bias: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    merge: int,
) -> Tensor:
    """Computes `patchify`, `normalise` and the linear map in one operation, with gradients for weight and bias.

    The normalisation is folded into the weights. A still image is multiplied by the sum of the weights of both frames.
    No (T, 1176) tensor exists; the backward pass reads the bytes again. The products are computed in the dtype of the
    weight. In bfloat16 the bytes are exact and the folded weights are rounded once. So the relative error of a product
    is at most 2^-8, the same as if the normalised pixels were rounded to bfloat16 instead.

    Args:
        pixels, frames, grid_thw, merge: see `patchify`. mean, std: see `normalise`.
        weight: (D, 3, 2, 14, 14), the order channel, frame, row, column. bias: (D,) or None.
    Returns: (T, D) in the dtype of the weight.
    Raises: ValueError as `check_frames`.
    """
    count = check_frames(pixels, frames, grid_thw)
    return _PatchEmbed.apply(weight, bias, pixels, frames, grid_thw, count, tuple(mean), tuple(std), merge)


def sigmoid_pairs(logits: Tensor, losses: Tensor, first: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """Replaces logits of pairs of an image and a text by the gradient of the sum of their sigmoid losses.

    The loss of a pair is softplus(-logit) if it is positive, and softplus(logit) otherwise.

    Args:
        logits: (n, c) float32, row i of image i; overwritten.
        losses: (n,) float32, overwritten with the sum of the losses of each row.
        first: the column of the text of image 0, below 0 or beyond the last column if it is in another chunk. The
            text of image i is in column first + i, and the pair is positive.
        ids: caption ids of the images (n,) and of the texts (c,), int64: equal captions are positive too; or None.
    """
    if ids is None:
        logits.diagonal(first).neg_()
    else:
        positive = torch.eq(ids[0][:, None], ids[1][None, :], out=torch.empty_like(logits))
        logits.addcmul_(positive, logits, value=-2)  # exactly -logit where positive
    torch.sum(F.softplus(logits), 1, out=losses)
    logits.sigmoid_()
    if ids is None:
        logits.diagonal(first).neg_()
    else:
        logits.addcmul_(positive, logits, value=-2)


def softmax_norms(
    logits: Tensor,
    row_norms: Tensor,
    column_norms: Tensor,
    counts: Tensor,
    sums: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """Computes the normalisers of a softmax over the texts of each image, and of one over the images of each text.

    Args:
        logits, first, ids: see `sigmoid_pairs`; the logits are not changed.
        row_norms: (n,) the log-sum-exp of each row over the chunks so far; updated. -inf before the first chunk.
        column_norms: (c,) overwritten with the log-sum-exp of each column.
        counts, sums: (n,) the number of positive texts of each image and the sum of their logits; those of the chunk
            are added. All float32.
    """
    torch.logaddexp(row_norms, logits.logsumexp(1), out=row_norms)
    torch.logsumexp(logits, 0, out=column_norms)
    if ids is None:
        own = logits.diagonal(first)
        begin = min(max(-first, 0), len(logits))
        counts[begin : begin + len(own)].add_(1)
        sums[begin : begin + len(own)].add_(own)
    else:
        positive = torch.eq(ids[0][:, None], ids[1][None, :], out=torch.empty_like(logits))
        counts.addmv_(positive, logits.new_ones(1).expand(logits.shape[1]))
        sums.view(-1, 1, 1).baddbmm_(positive[:, None], logits[:, :, None])


def softmax_pairs(
    logits: Tensor,
    row_shifts: Tensor,
    column_shifts: Tensor,
    weights: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """Replaces logits by exp(logit + row shift) + exp(logit + column shift), minus the row's weight for positive pairs.

    The result is the gradient of the sum of both cross entropies if the shifts are the negative normalisers, and the
    weights are 2 / number of positives.

    Args: logits, first, ids: see `sigmoid_pairs`; row_shifts, weights (n,), column_shifts (c,), all float32.
    """
    logits += torch.logaddexp(row_shifts[:, None], column_shifts[None, :])
    logits.exp_()
    if ids is None:
        own = logits.diagonal(first)
        begin = min(max(-first, 0), len(logits))
        own.sub_(weights[begin : begin + len(own)])
    else:
        positive = torch.eq(ids[0][:, None], ids[1][None, :], out=torch.empty_like(logits))
        logits.addcmul_(positive, weights[:, None], value=-1)


def check_frames(pixels: Tensor, frames: Sequence[int], grid_thw: Sequence[Sequence[int]]) -> int:
    """Returns the number of tokens of a pack. Raises: ValueError if bytes, frames and grids do not match."""
    byte = tokens = 0
    for count, (t, h, w) in zip(frames, grid_thw, strict=True):
        if not (count == 1 == t or count == TUBELET * t):
            raise ValueError(f"{count} frames do not match t = {t}: expected {TUBELET * t} frames, or 1 if t is 1")
        byte += count * h * w * PATCH * PATCH * CHANNELS
        tokens += t * h * w
    if byte != pixels.numel():
        raise ValueError(f"got {pixels.numel()} pixel bytes, but frames and grids require {byte}")
    return tokens


def fold_constants(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns (scales, shifts) per channel, for which (x / 255 - mean) / std = (x - 128) * scale + shift."""
    scales = [1 / (255 * s) for s in std]
    return scales, [(CENTRE / 255 - m) / s for m, s in zip(mean, std, strict=True)]


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        pixels: Tensor,
        frames: Sequence[int],
        grid_thw: Sequence[Sequence[int]],
        tokens: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        merge: int,
    ) -> Tensor:
        ctx.save_for_backward(pixels)
        ctx.pack, ctx.mean_std = (frames, grid_thw, merge), (mean, std)
        ctx.bias_dtype = None if bias is None else bias.dtype
        scale, shift = (weight.new_tensor(v, dtype=_wide(weight)).view(3, 1, 1, 1) for v in fold_constants(mean, std))
        wide = weight.to(_wide(weight))
        folded = (wide * scale).permute(2, 3, 4, 1, 0).flatten(1, 3)  # (frame, (row, column, channel), D)
        weights = {1: folded.sum(0).to(weight.dtype), TUBELET: folded.flatten(0, 1).to(weight.dtype)}
        offset = (wide * shift).sum((1, 2, 3, 4))
        offset = (offset if bias is None else offset + bias).to(weight.dtype)
        out = weight.new_empty(tokens, weight.shape[0])
        for span, rows in _byte_rows(pixels, *ctx.pack, weight.dtype):
            torch.addmm(offset, rows, weights[rows.shape[1] // folded.shape[1]], out=out[span])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (pixels,) = ctx.saved_tensors
        wide, width = _wide(grad), grad.shape[1]
        frame = PATCH_VALUES // TUBELET
        folded = grad.new_zeros(width, TUBELET, frame, dtype=wide)
        for span, rows in _byte_rows(pixels, *ctx.pack, grad.dtype):
            folded += (grad[span].T @ rows).unflatten(1, (-1, frame))  # a still image adds to both frames
        scale, shift = (grad.new_tensor(v, dtype=wide).view(3, 1, 1, 1) for v in fold_constants(*ctx.mean_std))
        total = grad.sum(0, dtype=wide)
        weight = folded.view(width, TUBELET, PATCH, PATCH, CHANNELS).permute(0, 4, 1, 2, 3) * scale
        weight += total.view(-1, 1, 1, 1, 1) * shift
        return (
            weight.to(grad.dtype),
            None if ctx.bias_dtype is None else total.to(ctx.bias_dtype),
            *[None] * 7,
        )


def _byte_rows(
    pixels: Tensor, frames: Sequence[int], grid_thw: Sequence[Sequence[int]], merge: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice, rows) for batches of tokens: their indices in the pack, and one row of bytes minus 128 per token.

    A row is ordered (frame, row, column, channel), with 588 values for still images and 1176 for videos. All batches
    use the same buffer.
    """
    room = max([BATCH * PATCH_VALUES // TUBELET, *(merge * w * PATCH_VALUES for _, _, w in grid_thw)])
    buffer = torch.empty(room, dtype=dtype, device=pixels.device)
    start = filled = width = 0
    for cells in _cells(pixels, frames, grid_thw, merge, room):
        shape = cells.shape
        tokens, needed = math.prod(shape[:4]), math.prod(shape[4:])
        if filled and (needed != width or (filled + tokens) * width > room):
            yield slice(start, start + filled), buffer[: filled * width].view(filled, width).sub_(CENTRE)
            start, filled = start + filled, 0
        width = needed
        buffer[filled * width : (filled + tokens) * width].view(shape).copy_(cells)
        filled += tokens
    if filled:
        yield slice(start, start + filled), buffer[: filled * width].view(filled, width).sub_(CENTRE)


def _cells(
    pixels: Tensor, frames: Sequence[int], grid_thw: Sequence[Sequence[int]], merge: int, room: int
) -> Iterator[Tensor]:
    """Yields views of the pixels in the order of the tokens, (block rows, block columns, merge, merge, frames, 14, 42).

    A view has at most `room` bytes."""
    byte = 0
    for count, (t, h, w) in zip(frames, grid_thw, strict=True):
        size = count * h * w * PATCH * PATCH * CHANNELS
        shape = (t, count // t, h // merge, merge, PATCH, w // merge, merge, PATCH * CHANNELS)
        steps = pixels[byte : byte + size].view(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
        byte += size
        for step in steps:
            yield from step.split(max(1, room // math.prod(step.shape[1:])))


def _wide(x: Tensor) -> torch.dtype:
    """Returns float32, or the dtype of x if it is wider."""
    return torch.promote_types(x.dtype, torch.float32)
