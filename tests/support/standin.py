"""Small models with the forward signature of ContrastiveModel, and random packs, for tests without towers and files."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.closeness import STORED, gradient_terms, transformer_terms
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import PATCH
from univitar_ds.kernels.reference import normalise, patchify
from univitar_ds.model.encoder import UniViTAR

HIDDEN, HEADS, JOINT, VOCAB = 24, 4, 16, 53
LANES = 4
ITEMS, TOKENS = 5, 9
"""Maximum number of items in a lane's pack, and of tokens in an item."""
_FORWARD = 588 + transformer_terms(width=HIDDEN, inner=64, head=HIDDEN // 2, layers=2, longest=TOKENS) + TOKENS + JOINT
STANDIN_TERMS = gradient_terms(_FORWARD, LANES * ITEMS * TOKENS + (LANES * ITEMS) ** 2)
"""`terms` of a gradient of either model below, with their largest sizes; see `tests.support.closeness`. The last sums
are over the tokens of all lanes, and that of the loss over all pairs of items."""
HALF_TERMS = 2 * STORED / (LANES * 2 * 4)
"""`terms` of a gradient in bfloat16, which is a mean over the tokens of at least two items per lane, with 4 tokens on
average."""
HALF_NUMBER_TERMS = 2 * STORED / (LANES * 2 * HIDDEN)
"""`terms` in bfloat16 of a scalar of a step, such as the loss, which depends on all entries of all items' vectors."""
HALF_NORM_TERMS = 3 * HALF_NUMBER_TERMS
"""`terms` in bfloat16 of a gradient's norm: the tensors of forward and backward pass, and the gradients."""


@dataclass
class Pack:
    pixels: Tensor
    frames: Tensor
    grid_thw: Tensor
    token_ids: Tensor
    text_lengths: Tensor
    caption_ids: Tensor
    lane: int = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN + 7), nn.Linear(2 * HIDDEN + 7, HIDDEN)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(-1, 3, HEADS, HIDDEN // HEADS).unbind(1)
        mixed = [
            F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in item))[0].transpose(0, 1)
            for item in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        x = x + self.out(torch.cat([*mixed, q[:0]]).reshape(-1, HIDDEN))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class StandIn(nn.Module):
    """A small model whose tokens are patch means. Every module runs once for any pack, as ZeRO-3 requires.

    `spare` is used only if `use_spare` is set; `fixed` is frozen.
    """

    def __init__(self, *, depth: int = 2, checkpointing: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inlet = nn.Linear(3, HIDDEN)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.vision_proj = nn.Linear(HIDDEN, JOINT, bias=False)
            self.embedding = nn.Embedding(VOCAB, HIDDEN)
            self.text_proj = nn.Linear(HIDDEN, JOINT)
            self.spare = nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.fixed = nn.Linear(HIDDEN, HIDDEN)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))
        self.register_buffer("mean", torch.full((3,), 127.5))
        self.fixed.requires_grad_(False)
        self.checkpointing, self.use_spare = checkpointing, True

    def forward(self, pixels, frames, grid_thw, token_ids, text_lengths):
        weight = self.inlet.weight
        lengths = [int(n) * int(h) * int(w) for n, (_, h, w) in zip(frames, grid_thw, strict=True)]
        rows = pixels.view(-1, PATCH * PATCH, 3)
        x = self.inlet(((rows.float() - self.mean.float()).mean(1) / 32).to(weight.dtype))
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, lengths, use_reentrant=False)
            else:
                x = block(x, lengths)
        if self.use_spare:
            x = x + 0.1 * self.spare(x)
        x = x + 0.1 * self.fixed(x)
        item = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        pooled = x.new_zeros(len(lengths), HIDDEN).index_add(0, item, x)
        real = (torch.arange(token_ids.shape[1]) < text_lengths[:, None])[..., None]
        text = (self.embedding(token_ids) * real).sum(1)
        vision, text = self.vision_proj(pooled).float(), self.text_proj(text).float()
        scale, bias = self.logit_scale.float().exp(), self.logit_bias.float() * 1.0
        return F.normalize(vision, dim=-1), F.normalize(text, dim=-1), scale, bias


class WithEncoder(nn.Module):
    """The real encoder with mean pooling over the tokens of an item, and a bag of words for captions."""

    def __init__(self, *, checkpoint_every: int | str = 0, seed: int = 0, hidden: int = HIDDEN) -> None:
        super().__init__()
        config = EncoderConfig(
            hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, initializer_factor=1.0
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.vision = UniViTAR(config, checkpoint_every=checkpoint_every)
            self.vision_proj = nn.Linear(hidden, JOINT, bias=False)
            self.embedding = nn.Embedding(VOCAB, JOINT)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, pixels, frames, grid_thw, token_ids, text_lengths):
        grids = grid_thw.tolist()
        tokens = self.vision(normalise(patchify(pixels, frames.tolist(), grids, 1), (0.5,) * 3, (0.5,) * 3), grids)
        item = torch.repeat_interleave(torch.arange(len(grids)), grid_thw.prod(1))
        pooled = tokens.new_zeros(len(grids), tokens.shape[1]).index_add(0, item, tokens)
        real = (torch.arange(token_ids.shape[1]) < text_lengths[:, None])[..., None]
        vision, text = self.vision_proj(pooled), (self.embedding(token_ids) * real).sum(1)
        scale, bias = self.logit_scale.exp(), self.logit_bias * 1.0
        return F.normalize(vision, dim=-1), F.normalize(text, dim=-1), scale, bias


def pack(step: int, lane: int, *, empty: bool = False) -> Pack:
    """The pack of a lane at a step: 2 to 5 images with a caption each, or none if `empty`."""
    g = torch.Generator().manual_seed(1_000_003 * step + lane + 17)
    n = 0 if empty else int(torch.randint(2, 6, (1,), generator=g))
    grid = torch.cat([torch.ones(n, 1, dtype=torch.int64), torch.randint(1, 4, (n, 2), generator=g)], dim=1)
    size = int(grid.prod(1).sum()) * PATCH * PATCH * 3
    base = torch.randint(0, 256, (size // 588, 1, 3), generator=g)
    return Pack(
        pixels=base.expand(-1, PATCH * PATCH, 3).reshape(-1).to(torch.uint8),
        frames=torch.ones(n, dtype=torch.int64),
        grid_thw=grid,
        token_ids=torch.randint(0, VOCAB, (n, 5), generator=g),
        text_lengths=torch.randint(1, 6, (n,), generator=g),
        caption_ids=torch.randint(0, 1 << 62, (n,), generator=g),
        lane=lane,
    )


def inputs(batch: Pack) -> tuple[Tensor, ...]:
    return batch.pixels, batch.frames, batch.grid_thw, batch.token_ids, batch.text_lengths
