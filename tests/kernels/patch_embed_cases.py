"""Packs for patch_embed, the truth about them in float64, and how far from it an exact-as-can-be result may lie."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

SINGLE = 2**-24 * 1200
"""Of a sum of up to 1176 terms in float32, one rounding for each."""
MEAN, STD = (0.48, 0.45, 0.40), (0.23, 0.22, 0.30)
PACKS = {
    "stills": (1, [(1, 3, 5), (1, 1, 1), (1, 7, 2), (1, 1, 9)]),
    "clips": (1, [(2, 3, 2), (1, 4, 3), (3, 1, 1)]),
    "stills and clips": (1, [(1, 2, 3), (2, 3, 5), (1, 1, 1)]),
    "one token": (1, [(1, 1, 1)]),
    "many of one token": (1, [(1, 1, 1)] * 21),
    "blocks": (2, [(1, 2, 4), (2, 4, 2), (1, 6, 4)]),
    "blocks of stills": (2, [(1, 4, 6), (1, 2, 2), (1, 2, 6)]),
}
"""merge, and grids. The clip of one step has two frames, the still one."""


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
    """In float64: tokens, gradients of weight and bias, and the sums of the absolute terms of each."""

    tokens: Tensor
    weight: Tensor
    bias: Tensor
    tokens_size: Tensor
    weight_size: Tensor
    bias_size: Tensor


def truth(case: Pack, weight: Tensor, bias: Tensor | None, grad: Tensor) -> Truth:
    """From the definition: patches, normalised, times the weights."""
    rows = reference.patchify(case.pixels, case.frames, case.grids, case.merge).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).repeat_interleave(392) for v in (MEAN, STD))
    values = (rows / 255 - mean) / std
    # What is added up: bytes less 128, and the shift from there to the mean.
    terms = (rows - 128).abs() / 255 / std + ((128 / 255 - mean) / std).abs()
    wide, upstream = weight.double().flatten(1), grad.double()
    offset = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return Truth(
        tokens=F.linear(values, wide, offset),
        weight=(upstream.T @ values).view(weight.shape),
        bias=upstream.sum(0),
        tokens_size=F.linear(terms, wide.abs(), offset.abs()),
        weight_size=(upstream.T.abs() @ terms).view(weight.shape),
        bias_size=upstream.abs().sum(0),
    )


def gradients(
    function: Callable[..., Tensor], case: Pack, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Tokens, and the gradients of weight and bias."""
    wanted = [x.requires_grad_() for x in (weight, bias) if x is not None]
    tokens = function(case.pixels, case.frames, case.grids, weight, bias, **case.rule())
    return tokens.detach(), [*torch.autograd.grad(tokens, wanted, grad), None][:2]


def assert_near(result: Tensor, wanted: Tensor, size: Tensor, relative: float, last: float) -> None:
    """Within `relative` of the sum of absolute terms and `last` (the rounding of the result) of the result itself."""
    error = (result.double() - wanted).abs()
    limit = relative * size + last * wanted.abs()
    assert (error <= limit).all(), f"{(error / limit).max():.2f} times the error that rounding explains"
