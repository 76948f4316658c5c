"""The contenders of `bench_cpu.py`: our encoder, other implementations of the same shape, and the floor.

All contenders have the 0.3B's width (1024), heads (16), feed-forward FLOPs and patches of 1176 values (Siglip2: 588),
random weights and `layers` blocks. A contender is built for a dtype. Each call runs forward on a `Group` of images, and
backward from the group's gradient.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.kernels import dispatch
from univitar_ds.model.encoder import UniViTAR

PEERS = Path(__file__).parents[1] / ".peers"
"""Folder of packages that only these contenders need."""
WIDTH, HEADS, HEAD, INNER, PLAIN_INNER, PATCH_VALUES = 1024, 16, 64, 2816, 4224, 1176


@dataclass(frozen=True)
class Group:
    """Images that run together: `patches` (T, 1176), and the gradient of the output `grad` (T, D).

    `padded_to` is the number of tokens to which an image is padded."""

    grids: tuple[tuple[int, int], ...]
    patches: Tensor
    grad: Tensor
    padded_to: int

    @property
    def lengths(self) -> list[int]:
        return [h * w for h, w in self.grids]

    def padded(self, rows: Tensor) -> Tensor:
        """Pads each image with zeros: (T, X) -> (N, padded_to, X)."""
        out = rows.new_zeros(len(self.grids), self.padded_to, rows.shape[1])
        for row, piece in zip(out, rows.split(self.lengths), strict=True):
            row[: len(piece)] = piece
        return out

    def valid(self) -> Tensor:
        """Returns the mask of tokens that are not padding, (N, padded_to) bool."""
        return torch.arange(self.padded_to) < torch.tensor(self.lengths)[:, None]


Step = Callable[[Group], None]


def trained(model: nn.Module, forward: Callable[[Group], tuple[Tensor, Tensor]]) -> Step:
    """Returns a step of `forward`, which returns the output and the output's gradient, and of the backward pass."""

    def step(group: Group) -> None:
        model.zero_grad(set_to_none=True)
        output, grad = forward(group)
        output.backward(grad)

    return step


def ours(layers: int, dtype: torch.dtype, compiled: bool) -> Step:
    """Returns the encoder of this project, which runs a group as a pack."""
    model = UniViTAR(EncoderConfig(num_hidden_layers=layers)).to(dtype)

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        dispatch.compile_on_cpu(compiled)
        return model(group.patches, [(1, h, w) for h, w in group.grids]), group.grad

    return trained(model, forward)


class TablesBlock(nn.Module):
    """A block like that of the release, in plain eager operations: tables of angles, rotation by halves, attention item
    by item."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.inner_norm = PlainRMS(WIDTH), PlainRMS(WIDTH), PlainRMS(INNER)
        self.q_norm, self.k_norm = PlainRMS(WIDTH), PlainRMS(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.ls1, self.ls2 = nn.Parameter(torch.full((WIDTH,), 0.1)), nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, x: Tensor, angles: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attend(self.norm1(x), angles, lengths) * self.ls1
        h = self.norm2(x)
        return x + self.down(self.inner_norm(F.silu(self.gate(h)) * self.up(h))) * self.ls2

    def attend(self, x: Tensor, angles: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 3, HEADS, HEAD).unbind(1)
        q, k = rotated(q, angles), rotated(k, angles)
        q = self.q_norm(q.flatten(1)).view(q.shape)
        k = self.k_norm(k.flatten(1)).view(k.shape)
        qkv, outputs, start = torch.stack((q, k, v), dim=1), [], 0
        for length in lengths:
            item = qkv[start : start + length].permute(1, 2, 0, 3).unsqueeze(1)
            outputs.append(F.scaled_dot_product_attention(*item).squeeze(0).transpose(0, 1))
            start += length
        return self.proj(torch.cat(outputs).reshape(len(x), WIDTH))


class PlainRMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates heads: (T, H, K), (T, K/2) -> (T, H, K). The tables are computed for q and for k in each layer."""
    cos, sin = (table.repeat(1, 2)[:, None] for table in (angles.cos(), angles.sin()))
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def tables(layers: int, dtype: torch.dtype) -> Step:
    """Returns an encoder of `TablesBlock`s, which runs a group as a pack."""
    embed = nn.Linear(PATCH_VALUES, WIDTH)
    model = nn.ModuleList([embed, *(TablesBlock() for _ in range(layers))]).to(dtype)

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in group.grids])
        frequencies = 1 / 10000 ** (torch.arange(0, HEAD // 2, 2) / (HEAD // 2))
        angles, x = (positions[:, :, None] * frequencies).flatten(1), model[0](group.patches)
        for block in model[1:]:
            x = block(x, angles, group.lengths)
        return x, group.grad

    return trained(model, forward)


class PlainBlock(nn.Module):
    """A block of LayerNorm, masked attention, and GELU with the FLOPs of our SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, PLAIN_INNER), nn.GELU(), nn.Linear(PLAIN_INNER, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def padded(layers: int, dtype: torch.dtype) -> Step:
    """Returns a plain ViT with learned positions, on padded images with a mask."""
    parts = {"embed": nn.Linear(PATCH_VALUES, WIDTH), "blocks": nn.ModuleList(PlainBlock() for _ in range(layers))}
    model = nn.ModuleDict(parts)
    model.positions = nn.Parameter(torch.randn(1024, WIDTH) * 0.02)
    model.to(dtype)

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        x = model["embed"](group.padded(group.patches)) + model.positions[: group.padded_to]
        mask = group.valid()[:, None, None, :]
        for block in model["blocks"]:
            x = block(x, mask)
        return x, group.padded(group.grad)

    return trained(model, forward)


def siglip2(layers: int, dtype: torch.dtype) -> Step:
    """Returns transformers' Siglip2 NaFlex vision model of this shape, with patches of one frame (588 values)."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    config = Siglip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=PLAIN_INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        patch_size=14, num_patches=256, vision_use_head=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = Siglip2VisionModel(config).to(dtype)

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        pixels = group.padded(group.patches[:, : PATCH_VALUES // 2])
        output = model(pixels, group.valid().long(), torch.tensor(group.grids))
        return output.last_hidden_state, group.padded(group.grad)

    return trained(model, forward)


@contextmanager
def peers_first(folder: Path = PEERS) -> Iterator[None]:
    """Makes imports search `folder` first in this context; `folder` is not searched outside of the context."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def timm_naflex(layers: int, dtype: torch.dtype) -> Step:
    """Returns timm's NaFlexViT with rotary positions, normed q and k, SwiGLU with a norm, and LayerScale.

    Raises: ImportError if timm is not installed.
    """
    if "torchvision" not in sys.modules:  # torchvision's operators do not fit a CPU torch and are not used
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    with peers_first():
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    config = NaFlexVitCfg(
        patch_size=14, embed_dim=WIDTH, depth=layers, num_heads=HEADS, mlp_ratio=INNER / WIDTH, scale_mlp_norm=True,
        qkv_bias=False, qk_norm=True, init_values=0.1, pos_embed="none", rope_type="axial", attn_type="rope",
        swiglu_mlp=True, norm_layer="rmsnorm", global_pool="", final_norm=False,
    )  # fmt: skip
    model = NaFlexVit(config, in_chans=6, num_classes=0).to(dtype)

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        positions = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in group.grids]
        coordinates = group.padded(torch.cat(positions))
        output = model(group.padded(group.patches), coordinates, group.valid())
        return output, group.padded(group.grad)

    return trained(model, forward)


def floor(layers: int, dtype: torch.dtype) -> Step:
    """Returns a step with only the matrix products, the attention calls, and one pass over memory for the rest."""
    shapes = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
    weights = [[torch.randn(shape, dtype=dtype) * 0.02 for shape in shapes] for _ in range(layers)]
    embed = torch.randn(WIDTH, PATCH_VALUES, dtype=dtype)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    memory = [Memory(17, WIDTH, dtype), Memory(4, INNER, dtype)]

    def product(x: Tensor, weight: Tensor, backward_input: bool = True) -> Tensor:
        output = F.linear(x, weight)
        if backward_input:
            torch.mm(output, weight)
        torch.mm(output.t(), x)
        return output

    def step(group: Group) -> None:
        x = product(group.patches, embed, backward_input=False)
        inner = x.new_zeros(len(x), INNER)
        for qkv, proj, gate, up, down in weights:
            product(x, qkv)
            for piece in x.view(-1, HEADS, HEAD).split(group.lengths):
                item = piece.transpose(0, 1)[None]
                output, sums = attend(item, item, item)
                attend_backward(item, item, item, item, output, sums, 0.0, False)
            product(x, proj)
            product(x, gate)
            product(x, up)
            product(inner, down)
            for part in memory:
                part.copy(len(x))

    return step


class Memory:
    """Copies that read and write as many values as the rest of a block. A copy reads and writes one value per token and
    channel.

    Values per token and channel of D, read + written, forward and backward: norm 1+1, 3+1; rotation and norm of q, k
    2+2, 5+3; residual and norm 2+2, 4+2; residual 2+1, 2+1. The sum is 34, so 17 copies. Of F: SiLU gate and norm 2+1,
    3+2. The sum is 8, so 4 copies.
    """

    MAX_TOKENS = 4096

    def __init__(self, copies: int, width: int, dtype: torch.dtype) -> None:
        self.sources, self.targets = torch.ones(2, copies, self.MAX_TOKENS, width, dtype=dtype)

    def copy(self, tokens: int) -> None:
        for source, target in zip(self.sources, self.targets, strict=True):
            target[:tokens].copy_(source[:tokens])
