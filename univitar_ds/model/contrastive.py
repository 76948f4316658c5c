"""The contrastive model: both towers with pooling and projections, which map images and captions to unit vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.config.model import ModelConfig
from univitar_ds.model.blocks.attention import CuSeqlens, attention
from univitar_ds.model.blocks.dropping import DropPlan
from univitar_ds.model.blocks.layers import RMSNorm
from univitar_ds.model.distill_heads import Distilled, DistillHeads
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import as_json


class AttentionPool(nn.Module):
    """Attention pooling: one learned query attends to all tokens of an item.

    The tokens are normed first, because the encoder has no final norm.
    """

    def __init__(self, width: int, heads: int, eps: float, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.norm = RMSNorm(width, eps)
        query = torch.empty(width)
        if not query.is_meta:  # on meta, normal_ would import torch._dynamo, which takes a second
            query.normal_().mul_(width**-0.5)
        self.query = nn.Parameter(query)
        self.kv = nn.Linear(width, 2 * width)
        nn.init.xavier_uniform_(self.kv.weight)
        nn.init.zeros_(self.kv.bias)

    def forward(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Returns (N, D) pooled features. Args: tokens: (T, D); lengths: number of tokens of each item."""
        count, width = len(lengths), tokens.shape[1] // self.heads
        k, v = self.kv(self.norm(tokens)).view(-1, 2, self.heads, width).unbind(1)
        # The query is copied for each item: flash-attn 3 and 4 may reject a stride of 0 in q.
        q = self.query.view(1, self.heads, width).expand(count, -1, -1).contiguous()
        queries, keys = (CuSeqlens.of(spans, tokens.device) for spans in ([1] * count, lengths))
        return attention(q, k, v, queries, keys, self.backend)


class Embedded(NamedTuple):
    """Output for a pack of N items: `vision` and `text`, (N, E) float32 unit vectors; `scale` and `bias` of the logits,
    (1,); features in the teacher's width if requested."""

    vision: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    distilled: Distilled | None = None


class ContrastiveModel(nn.Module):
    """The trained model. Training calls `forward` through the DeepSpeed engine; evaluation calls `encode_*`.

    With `teacher_width` the model has heads for distillation. Without `teacher_width`, it ignores the weights of such
    heads in a loaded state, because only training uses them.
    """

    exact_parameters = ("logit_scale", "logit_bias")
    """Parameters of one element that the forward pass uses in float32, though the model may be in bfloat16."""

    def __init__(
        self, vision: UniViTAR, text: nn.Module, config: ModelConfig, teacher_width: int | None = None
    ) -> None:
        super().__init__()
        width = vision.config.hidden_size
        self.vision = vision
        self.pool = AttentionPool(width, config.pool_heads, vision.config.layer_norm_eps, config.attention)
        self.vision_proj = nn.Linear(width, config.embed_dim, bias=False)
        self.text = text
        self.text_proj = nn.Linear(text.width, config.embed_dim, bias=False)
        for head in (self.vision_proj, self.text_proj):
            nn.init.xavier_uniform_(head.weight)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.logit_scale_init)]))
        self.logit_bias = nn.Parameter(torch.tensor([float(config.logit_bias_init)]))
        self.exact: dict[str, Tensor] = {}
        """The float32 values of `exact_parameters`, each (1,), kept by the engine; empty: those of the parameters."""
        self.distill: DistillHeads | None = None
        if teacher_width is None:
            self.register_load_state_dict_pre_hook(leave_heads_aside)
        else:
            self.distill = DistillHeads(width, teacher_width, vision.config.layer_norm_eps)

    def description(self) -> dict[str, Any]:
        """Returns the configurations of the encoder and of the text model, as JSON objects."""
        return {"encoder": self.vision.config.to_dict(), "text": as_json(self.text.model.config)}

    def forward(
        self,
        pixels: Tensor,
        frames: Tensor,
        grid_thw: Tensor,
        token_ids: Tensor,
        text_lengths: Tensor,
        distill: bool = False,
        drops: DropPlan | None = None,
    ) -> Embedded:
        """Embeds one pack; N may be 0.

        Args: see `encode_vision` and `encode_text`; distill: whether to return `distilled`, for the tokens that remain;
            drops: tokens and branches that the encoder drops. If the encoder splits packs over ranks, `token_ids` and
            `text_lengths` are those of the items that this rank owns, and so are the results.
        """
        tokens, pooled = self._features(pixels, frames, grid_thw, drops)
        # Scale and bias are returned as new tensors: ZeRO-3 frees a parameter's storage after forward.
        return Embedded(
            F.normalize(self.vision_proj(pooled).float(), dim=-1),
            self.encode_text(token_ids, text_lengths),
            self._exact("logit_scale").exp(),
            self._exact("logit_bias") * 1.0,
            self.distill(tokens, pooled) if distill else None,
        )

    def _exact(self, name: str) -> Tensor:
        """Returns a parameter of one element in float32, with a gradient."""
        value = getattr(self, name).float()
        if name not in self.exact:
            return value
        # The sum is exact: the values differ only by the rounding to bfloat16. The gradient goes to the parameter.
        return value + (self.exact[name] - value).detach()

    def encode_vision(self, pixels: Tensor, frames: Tensor, grid_thw: Tensor) -> Tensor:
        """Embeds images and videos as unit vectors.

        Args:
            pixels: (B,) uint8, see `kernels.reference.patchify`; on the model's device.
            frames: (N,) number of frames per item; grid_thw: (N, 3) tokens along time, height, width; on the host.
        Returns: (N, E) float32.
        """
        _, pooled = self._features(pixels, frames, grid_thw)
        return F.normalize(self.vision_proj(pooled).float(), dim=-1)

    def _features(
        self, pixels: Tensor, frames: Tensor, grid_thw: Tensor, drops: DropPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns tokens (T, D), without dropped tokens, and pooled features (N, D) of a pack."""
        grids = grid_thw.tolist()
        tokens = self.vision(pixels, grids, frames=frames, drops=drops)
        return tokens, self.pool(tokens, self.vision.lengths(grids, drops))

    def encode_text(self, token_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Embeds captions as unit vectors.

        Args: token_ids: (N, S), padded after the end of text; text_lengths: (N,) number of real tokens per row, on
            the host or on the device.
        Returns: (N, E) float32.
        """
        return F.normalize(self.text_proj(self.text(token_ids, text_lengths)).float(), dim=-1)


def leave_heads_aside(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Removes the weights of distillation heads from `state`: a pre-hook of `load_state_dict` for models without
    heads."""
    for name in [name for name in state if name.startswith(f"{prefix}distill.")]:
        del state[name]
