"""Every fused operation written once in plain torch: the truth that kernels and tests are measured against.

Arithmetic runs in float32 for half-precision inputs, in the input's own precision otherwise; results have
the dtype of the input. Shape legend
    T tokens of a pack      H heads     K head width    D = H * K hidden width
    F feed-forward width    B pixel bytes of a pack     1176 = 3 channels * 2 frames * 14 * 14 pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 14
TUBELET = 2
CHANNELS = 3
PATCH_VALUES = CHANNELS * TUBELET * PATCH * PATCH


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension; the mean of squares and the scaling are in float32."""
    return F.rms_norm(x.to(_wide(x)), weight.shape, weight.to(_wide(x)), eps).to(x.dtype)


def rope2d(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotates heads by the token's row and column, rotate-half layout (UniViTAR release).

    A head of K values makes K/2 planes (i, i + K/2). The first K/4 planes turn by row * theta^(-2j/(K/2)),
    the other K/4 by column times the same frequencies. Time does not turn anything.

    Args: x (T, H, K) with K divisible by 4; positions (T, 2) integer rows and columns.
    Returns: (T, H, K) in float32 or wider.
    """
    half, wide = x.shape[-1] // 2, _wide(x)
    angles = rope2d_angles(positions, x.shape[-1], theta, wide)[:, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(wide).split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope2d_angles(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> Tensor:
    """By how much each plane of a head of `width` = K values turns: (T, 2) -> (T, K/2), in `dtype`."""
    half = width // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=dtype) / half
    return (positions.to(dtype)[:, :, None] * theta**-exponents).flatten(1)


def rope2d_norm(x: Tensor, positions: Tensor, weight: Tensor | None, *, theta: float, eps: float) -> Tensor:
    """Rotary embedding, then RMSNorm over all heads together (not per head); no norm without `weight`.

    Args: x (T, H, K); positions (T, 2) integers; weight (H * K,) or None.
    Returns: (T, H, K) in the dtype of x.
    """
    turned = rope2d(x, positions, theta)
    if weight is not None:
        turned = rms_norm(turned.flatten(1), weight, eps).view_as(x)
    return turned.to(x.dtype)


def rope2d_qk_norm(
    qkv: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, theta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope2d_norm` of queries and keys out of one projection; values pass through untouched.

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
    """RMSNorm(silu(gate) * up): (T, F), (T, F) -> (T, F)."""
    wide = _wide(gate)
    return rms_norm(F.silu(gate.to(wide)) * up.to(wide), weight, eps).to(gate.dtype)


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual sum with LayerScale, and its RMSNorm for the next branch.

    Args: x, branch (T, D); scale, weight (D,).
    Returns: (x + scale * branch, RMSNorm of it), both (T, D).
    """
    total = torch.addcmul(x, branch, scale)
    return total, rms_norm(total, weight, eps)


def patchify(
    pixels: Tensor, frames: Sequence[int], grid_thw: Sequence[tuple[int, int, int]], merge: int
) -> Tensor:
    """Cuts packed pictures and clips into the rows the patch embedding takes; nothing is padded.

    Args:
        pixels: (B,) uint8. Items one after another, each `frames[i]` frames of (h * 14, w * 14, 3) in raster order.
        frames: frames stored per item; one frame is a still picture and stands for both frames of its tokens.
        grid_thw: tokens per item along time, height, width.
        merge: tokens come in blocks of merge x merge neighbours: order (t, h/merge, w/merge, merge, merge).
    Returns: (T, 1176) uint8, each row ordered (channel, frame, row, column).
    """
    patches = pixels.new_empty(sum(math.prod(grid) for grid in grid_thw), PATCH_VALUES)
    byte = token = 0
    for count, (t, h, w) in zip(frames, grid_thw, strict=True):
        assert count == 1 == t or count == TUBELET * t, f"{count} frames cannot fill {t} steps of {TUBELET}"
        size, tokens = count * h * w * PATCH * PATCH * CHANNELS, t * h * w
        clip = pixels[byte : byte + size].view(count, h // merge, merge, PATCH, w // merge, merge, PATCH, CHANNELS)
        cells = clip.expand(TUBELET * t, *clip.shape[1:]).unflatten(0, (t, TUBELET))
        rows = patches[token : token + tokens]
        rows.view(t, h // merge, w // merge, merge, merge, CHANNELS, TUBELET, PATCH, PATCH).copy_(
            cells.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        )
        byte, token = byte + size, token + tokens
    assert byte == pixels.numel(), f"{pixels.numel()} pixel bytes, the grids take {byte}"
    return patches


def normalise(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to zero-mean values: (T, 1176) uint8 -> (T, 1176) float32, (x / 255 - mean) / std per channel."""
    values = patches.to(torch.float32).div_(255).unflatten(1, (CHANNELS, -1))
    shift, scale = (torch.tensor(v, dtype=torch.float32, device=patches.device)[:, None] for v in (mean, std))
    return values.sub_(shift).div_(scale).flatten(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
