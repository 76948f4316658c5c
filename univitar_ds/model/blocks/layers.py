"""The layers of the encoder, with the key names and the arithmetic of the release.

A weight is used only in the forward of the module that owns it: ZeRO-3 gathers the weights of a module when the module
is called; for other modules they are empty. A module that needs weights of other modules lists them in
`external_parameters`, and `training/engine/engine.py` gathers these as well when the module is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import PATCH, TUBELET
from univitar_ds.kernels.dispatch import add_norm, patch_embed, rms_norm, rope2d_qk_norm, swiglu_norm
from univitar_ds.kernels.reference import PATCH_VALUES
from univitar_ds.model.blocks.attention import CuSeqlens, attention
from univitar_ds.model.blocks.sequence_parallel import SplitSpans, split_attention


class RMSNorm(nn.Module):
    """Root mean square norm: x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the norm of `x`, with the same shape."""
        return rms_norm(x, self.weight, self.eps)


class AddNorm(RMSNorm):
    """Residual sum with LayerScale, followed by an RMSNorm."""

    def forward(self, x: Tensor, branch: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x + scale * branch and its norm, both (T, D). Args: x, branch: (T, D); scale: (D,)."""
        return add_norm(x, branch, scale, self.weight, self.eps)


class GatedNorm(RMSNorm):
    """The gated activation of SwiGLU with a norm: RMSNorm(silu(gate) * up)."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the norm, with the shape of `gate` and `up`."""
        return swiglu_norm(gate, up, self.weight, self.eps)


class PatchEmbedding(nn.Module):
    """Linear map of whole patches. The weight has the shape of the release's convolution."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.patch_embedding_bias
        self.options = {"mean": config.image_mean, "std": config.image_std, "merge": config.spatial_merge_size}
        self.weight = nn.Parameter(torch.empty(width, 3, TUBELET, PATCH, PATCH))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.xavier_uniform_(self.weight.data.view(width, PATCH_VALUES))

    def forward(
        self, patches: Tensor, frames: Sequence[int] | None = None, grids: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """Returns (T, D). `patches`: (T, 1176) normalised, or with `frames` the pixels, see `patch_embed`."""
        if frames is not None:
            return patch_embed(patches, frames, grids, self.weight, self.bias, **self.options)
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Attention(nn.Module):
    """Self-attention within each item, with rotary positions and normed q and k.

    `q_norm` and `k_norm` only own their weights: one operation norms and rotates q and k together.
    """

    def __init__(self, config: EncoderConfig, backend: str) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.theta, self.eps = config.rope_theta, eps
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width, eps) if config.qk_normalization else None
        self.k_norm = RMSNorm(width, eps) if config.qk_normalization else None

    def external_parameters(self) -> list[nn.Parameter]:
        """Returns weights of other modules that the forward uses."""
        return [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]

    def forward(self, x: Tensor, positions: Tensor, spans: CuSeqlens) -> Tensor:
        """Returns (T, D). Args: x: (T, D); positions: (T, 2) rows and columns; spans: boundaries of the items."""
        q, k, v = self._qkv(x, positions)
        if isinstance(spans, SplitSpans):
            return self.proj(split_attention(q, k, v, spans, self.backend))
        return self.proj(attention(q, k, v, spans, spans, self.backend))

    def probabilities(self, x: Tensor, positions: Tensor, spans: CuSeqlens) -> list[Tensor]:
        """Returns the weights that `forward` gives to the values, for each item (H, t, t): queries in rows, keys in
        columns. They are in float32 or wider. Args: as `forward`."""
        q, k, _ = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self._qkv(x, positions))
        scale, lengths = q.shape[-1] ** -0.5, list(spans.lengths)
        items = zip(q.split(lengths), k.split(lengths), strict=True)
        return [(scale * one.transpose(0, 1) @ other.permute(1, 2, 0)).softmax(dim=-1) for one, other in items]

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q and k, rotated and normed, and v, each (T, H, K)."""
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, x.shape[1] // self.heads)
        q_weight, k_weight = self.external_parameters() or (None, None)
        return rope2d_qk_norm(qkv, positions, q_weight, k_weight, theta=self.theta, eps=self.eps)


class SwiGLU(nn.Module):
    """SwiGLU with a norm: fc2(RMSNorm(silu(fc1 x) * fc3 x))."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.inner_width
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.fc3 = nn.Linear(width, inner)
        self.norm = GatedNorm(inner, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, D) to (T, D)."""
        return self.fc2(self.norm(self.fc1(x), self.fc3(x)))


def scale_branch(branch: Tensor, factors: Tensor | None) -> Tensor:
    """Returns branch * factors, (T, D). Args: branch: (T, D); factors: (T, 1) float32; None: all are 1.

    The product is rounded, not the factor: errors of rounded factors would not average out over random draws.
    """
    return branch if factors is None else (branch * factors).to(branch.dtype)


class Block(nn.Module):
    """An encoder block: x + ls1 * attn(norm1 x), then x + ls2 * mlp(norm2 x)."""

    def __init__(self, config: EncoderConfig, backend: str) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.ls1 = nn.Parameter(torch.full((width,), float(config.initializer_factor)))
        self.ls2 = nn.Parameter(torch.full((width,), float(config.initializer_factor)))
        self.norm1 = RMSNorm(width, eps)
        self.attn = Attention(config, backend)
        self.norm2 = AddNorm(width, eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, positions: Tensor, spans: CuSeqlens, factors: Tensor | None = None) -> Tensor:
        """Returns (T, D).

        Args: x: (T, D); positions: (T, 2); spans: boundaries of the items; factors: (2, T, 1) of both branches.
        Both branches always run: under ZeRO-3 no rank may skip a module.
        """
        first, second = (None, None) if factors is None else factors.unbind()
        x, normed = self.norm2(x, scale_branch(self.attn(self.norm1(x), positions, spans), first), self.ls1)
        return torch.addcmul(x, scale_branch(self.mlp(normed), second), self.ls2)
