"""Runs image models of transformers on the frames of a whole pack.

Frames of one size are embedded together, and the tokens of all frames pass through the blocks in one call.

A `Packing` has the three parts of a model's forward pass: before the blocks, the blocks with the norm that follows
them, and after the norm. The parts call the model's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from univitar_ds.model.blocks.attention import CuSeqlens
from univitar_ds.model.packed import packed

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary embeddings, (tokens, K) each."""


@dataclass(frozen=True)
class Packing:
    """The parts of a model. B frames of one size have L tokens each; T is the number of tokens of all frames.

    embed: (model, frames (B, 3, rows, columns)) -> states (B, L, D), and the rotation of the L tokens or None.
    encode: (model, states (1, T, D), rotation of the T tokens or None) -> states (1, T, D).
    finish: (model, states (B, L, D)) -> patches (B, h * w, D) and pooled (B, D).
    """

    embed: Callable[[nn.Module, Tensor], tuple[Tensor, Rotation | None]]
    encode: Callable[[nn.Module, Tensor, Rotation | None], Tensor]
    finish: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


def run_packed(model: nn.Module, packing: Packing, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns patches (B, h * w, D) and pooled (B, D) of each batch of normalised frames (B, 3, rows, columns).

    All frames of a batch have one size. The tokens of all batches pass through the blocks in one call."""
    embedded = [packing.embed(model, frames) for frames in batches]
    shapes = [states.shape[:2] for states, _ in embedded]
    items = CuSeqlens.of([length for count, length in shapes for _ in range(count)], batches[0].device)
    rotations = [one for (_, one), (count, _) in zip(embedded, shapes, strict=True) for _ in range(count) if one]
    rotation = tuple(torch.cat(parts) for parts in zip(*rotations, strict=True)) if rotations else None
    with packed(model, items):
        states = packing.encode(model, torch.cat([states.flatten(0, 1) for states, _ in embedded])[None], rotation)[0]
    parts = states.split([count * length for count, length in shapes])
    return [packing.finish(model, part.unflatten(0, shape)) for part, shape in zip(parts, shapes, strict=True)]


def _embed_dinov2(model: nn.Module, frames: Tensor) -> tuple[Tensor, None]:
    return model.embeddings(frames), None


def _encode_dinov2(model: nn.Module, states: Tensor, rotation: Rotation | None) -> Tensor:
    return model.layernorm(model.encoder(states).last_hidden_state)


def _embed_dinov3(model: nn.Module, frames: Tensor) -> tuple[Tensor, Rotation]:
    frames = frames.to(model.embeddings.patch_embeddings.weight.dtype)
    states = model.embeddings(frames)
    cos, sin = model.rope_embeddings(frames)
    prefix = states.shape[1] - len(cos)  # class token and registers: a rotation by 0 leaves them as they are
    unmoved = cos.new_ones(prefix, cos.shape[1]), sin.new_zeros(prefix, sin.shape[1])
    return states, (torch.cat([unmoved[0], cos]), torch.cat([unmoved[1], sin]))


def _encode_dinov3(model: nn.Module, states: Tensor, rotation: Rotation | None) -> Tensor:
    return model.norm(model.model(states, position_embeddings=rotation).last_hidden_state)


def _class_token_first(model: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    return states[:, first:], states[:, 0]


def _embed_siglip(model: nn.Module, frames: Tensor) -> tuple[Tensor, None]:
    return model.embeddings(frames, interpolate_pos_encoding=True), None


def _embed_siglip2(model: nn.Module, frames: Tensor) -> tuple[Tensor, None]:
    return model.embeddings(*cells_of(model, frames)), None


def _encode_siglip(model: nn.Module, states: Tensor, rotation: Rotation | None) -> Tensor:
    return model.post_layernorm(model.encoder(inputs_embeds=states).last_hidden_state)


def _pool_siglip(model: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    return states, model.head(states) if model.use_head else states.float().mean(1).to(states.dtype)


def cells_of(model: nn.Module, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inputs of SigLIP 2 for frames (B, 3, rows, columns): patches (B, h * w, C), each in the order row,
    column, channel, and the grids (B, 2) on the host, where transformers reads them one by one."""
    patch = model.config.patch_size
    h, w = frames.shape[2] // patch, frames.shape[3] // patch
    cells = frames.view(len(frames), 3, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    return cells.flatten(3).flatten(1, 2), torch.tensor([[h, w]] * len(frames))


DINOV2 = Packing(_embed_dinov2, _encode_dinov2, _class_token_first)
DINOV3 = Packing(_embed_dinov3, _encode_dinov3, _class_token_first)
SIGLIP = Packing(_embed_siglip, _encode_siglip, _pool_siglip)
SIGLIP2 = Packing(_embed_siglip2, _encode_siglip, _pool_siglip)
