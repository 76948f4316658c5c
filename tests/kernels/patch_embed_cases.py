"""Packs for patch_embed, and the truth about them in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.closeness import assert_sums_close, rounding
from univitar_ds.kernels import reference

MEAN, STD = (0.48, 0.45, 0.40), (0.23, 0.22, 0.30)
PACKS = {
    "stills": (1, [(1, 3, 5), (1, 1, 1), (1, 7, 2), (1, 1, 9)]),
    "clips": (1, [(2, 3, 2), (1, 4, 3), (3, 1, 1)]),
    "stills and videos": (1, [(1, 2, 3), (2, 3, 5), (1, 1, 1)]),
    "one token": (1, [(1, 1, 1)]),
    "many of one token": (1, [(1, 1, 1)] * 21),
    "blocks": (2, [(1, 2, 4), (2, 4, 2), (1, 6, 4)]),
    "blocks of stills": (2, [(1, 4, 6), (1, 2, 2), (1, 2, 6)]),
}
"""merge, and grids. The video of one step has two frames, the still one."""


@dataclass(frozen=True)
class Pack:
    pixels: Tensor
    frames: list[int]
    grids: list[tuple[int, int, int]]
    merge: int

    @property
    def tokens(self) -> int:
        return sum(map(math.prod, self.grids))

    def rule(self) -> dict:
        return {"mean": MEAN, "std": STD, "merge": self.merge}


def pack(name: str) -> Pack:
    merge, grids = PACKS[name]
    frames = [2 * t if name == "clips" or t > 1 else 1 for t, _, _ in grids]
    size = sum(count * h * w * 588 for count, (_, h, w) in zip(frames, grids, strict=True))
    generator = torch.Generator().manual_seed(len(name))
    return Pack(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator), frames, grids, merge)


def parameters(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, 3, 2, 14, 14, generator=generator) * 0.04
    return weight.to(dtype), torch.randn(width, generator=generator).to(dtype)


@dataclass(frozen=True)
class Truth:
    """In float64: tokens, gradients of weight and bias; and by how much a token may miss besides its sum's rounding."""

    tokens: Tensor
    weight: Tensor
    bias: Tensor
    reach: float = 0.0


def truth(case: Pack, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Truth:
    """From the definition: patches, normalised, times the weights."""
    rows = _rows(case)
    mean, std = (torch.tensor(v, dtype=torch.float64).repeat_interleave(392) for v in (MEAN, STD))
    values, upstream = (rows / 255 - mean) / std, grad.double()
    return Truth(
        tokens=F.linear(values, weight.double().flatten(1), None if bias is None else bias.double()),
        weight=(upstream.T @ values).view(weight.shape),
        bias=upstream.sum(0),
    )


def truth_of_stored(case: Pack, weight: Tensor, bias: Tensor, grad: Tensor, *, paired: bool, offset: bool) -> Truth:
    """`truth` in bfloat16, which is the type that folded weights are stored in: those as stored, times bytes less 128.

    A still meets the sum of the two temporal kernels, stored once; `paired`: both of them, for a pack with a video.
    `offset`: the bias with what the means leave is stored in bfloat16 too.
    """
    scale, shift = (torch.tensor(v).view(3, 1, 1, 1) for v in reference.fold_constants(MEAN, STD))
    wide = weight.double()
    left = bias.double() + (wide * shift.double()).sum((1, 2, 3, 4))
    folded = weight.float() * scale
    kinds = {2: _stored(folded), 1: _stored(folded.sum(2))}
    parts = []
    for count, rows in zip(case.frames, _rows(case).split([math.prod(grid) for grid in case.grids]), strict=True):
        rows = (rows - reference.CENTRE).view(-1, 3, 2, 196)
        if count == 1 and not (paired and max(case.frames) > 1):
            parts.append(rows[:, :, 0].flatten(1) @ kinds[1].flatten(1).T)
        else:
            parts.append(rows.flatten(1) @ kinds[2].flatten(1).T)
    tokens = torch.cat(parts) + (_stored(left.float()) if offset else left)
    # A weight half-way between two stored values may go either way, by the order in which it was folded.
    reach = 2 * rounding(torch.bfloat16) * reference.CENTRE * kinds[1].abs().max().item()
    return replace(truth(case, weight, bias, grad), tokens=tokens, reach=reach)


def _rows(case: Pack) -> Tensor:
    return reference.patchify(case.pixels, case.frames, case.grids, case.merge).double()


def _stored(x: Tensor) -> Tensor:
    """float32 as bfloat16 keeps it, rounded or, in Triton's interpreter, cut off; in float64."""
    if rounding(torch.bfloat16) < 2**-7:
        return x.bfloat16().double()
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32).double()


def gradients(
    function: Callable[..., Tensor], case: Pack, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Tokens, and the gradients of weight and bias."""
    wanted = [x.requires_grad_() for x in (weight, bias) if x is not None]
    tokens = function(case.pixels, case.frames, case.grids, weight, bias, **case.rule())
    return tokens.detach(), [*torch.autograd.grad(tokens, wanted, grad), None][:2]


def assert_tokens_close(tokens: Tensor, exact: Truth) -> None:
    assert_sums_close(tokens, exact.tokens, 1176, "tokens", reach=exact.reach)


def assert_gradients_close(grads: list[Tensor | None], exact: Truth, tokens: int) -> None:
    """Gradients of weight and bias: summed over tokens, and the folding taken out in four steps."""
    for got, wanted, name in zip(grads, (exact.weight, exact.bias), ("weight", "bias"), strict=True):
        if got is not None:
            assert_sums_close(got, wanted, tokens + 4, f"gradient of the {name}")
