"""When two results of floating-point sums are the same: one rule, with one number.

    |got - wanted| <= C * eps(dtype) * sqrt(terms) * scale        for every entry

`eps` is of the type in which the sums run, `scale` the largest absolute value of the whole tensor that is wanted, and
`terms` how many numbers an entry is summed of: where sums follow on sums, as through the layers of a model, all of them
on the longest way. Which order a sum takes depends on the processor, its instruction set and the number of threads; a
bound by this rule depends on none of them.

Why C is 4. A rounding is an error between -eps/2 and eps/2 of a partial sum: 0.29 eps in the root mean square. A sum of
n terms makes n of them, which are independent: 0.29 eps sqrt(n). Of ten thousand entries the worst is at 4 deviations,
and the difference of two results is sqrt(2) of one: 1.6 eps sqrt(n) of a partial sum, which is at most about as large
as `scale`. The rest, a factor of 2.5, is for what lies between the sums of a model (norms, softmaxes, activations, each
of which may make a relative error larger) and for terms that cancel. Measured, with vectors of 16, 8 and 1 numbers and
1 to 4 threads: at most 1.1 where a handful of terms is summed and 0.5 in models, whose sums are taken in parts.

bfloat16 and float16 are types of storage here: sums run in float32, so `eps` is that of float32, and the entry is
rounded once when it is stored, by `rounding(dtype)` of itself. Only where every tensor on the way is stored so (a model
in bfloat16) stored tensors are what rounds: dtype=torch.bfloat16, and `terms` counts those on the longest way, divided
by how many entries with errors of their own the result is a mean of. Then one entry may be several percent off. But
errors are independent, so along the whole tensor they cancel: |<got - wanted, wanted>| is at most the 2-norm of the
bounds times `wanted`, entry by entry, which sees an error that all entries share.

Every comparison proves that it can fail: the same bound must refuse the wanted values made larger or smaller by 1 %.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from univitar_ds.config.encoder import EncoderConfig

C = 4.0
SEEN = 0.01
"""An error that every comparison must see."""
HALF = (torch.bfloat16, torch.float16)
Values = Tensor | float | Sequence[float]


def rounding(dtype: torch.dtype) -> float:
    """What storing a value loses of it: half of eps; Triton's interpreter cuts bfloat16 off, which is all of it."""
    cut = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(dtype).eps / (1 if cut else 2)


def entry_bound(terms: float, scale: float, dtype: torch.dtype) -> float:
    """C * eps * sqrt(terms) * scale."""
    return C * torch.finfo(dtype).eps * math.sqrt(terms) * scale


def assert_sums_close(
    got: Values,
    wanted: Values,
    terms: float,
    what: str = "result",
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    reach: Tensor | float = 0.0,
) -> None:
    """`got` is `wanted` but for the order of sums of `terms` numbers, and an error of 1 % would be seen.

    Args:
        dtype: in which the sums run; that of `got` where it is wider than 16 bits, else float32.
        scale: where it is not the largest absolute value of `wanted`, because what is wanted is a small difference of
            large numbers: the largest of those.
        reach: what an entry may miss besides, e.g. by `adam_reach`; of the shape of `wanted` or one for all.

    Raises: AssertionError, also where the bound is too wide to see an error of 1 %.
    """
    given = got.dtype if isinstance(got, Tensor) else torch.float32
    dtype = dtype or (torch.float32 if given in HALF else given)
    got, wanted = _wide(got), _wide(wanted)
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}"
    if not wanted.numel():
        return
    largest = wanted.abs().max().item()
    bound = entry_bound(terms, largest if scale is None else scale, dtype)
    stored = rounding(given) if given in HALF and dtype not in HALF else 0.0
    limit = bound + stored * wanted.abs() + reach

    def fault(values: Tensor) -> str | None:
        error = (values - wanted).abs()
        if not (error <= limit).all():  # in this form for values that are not numbers
            place = (error / limit).nan_to_num(torch.inf).argmax()
            found, right = values.flatten()[place].item(), wanted.flatten()[place].item()
            times = (error / limit).flatten()[place].item()
            return f"{found:.8g} instead of {right:.8g} at {place.item()}, {times:.3g} times what is allowed"
        along = ((values - wanted) * wanted).sum().abs().item()
        if dtype in HALF and along > (limit * wanted).norm().item():
            return f"all entries together are wrong by {along / wanted.square().sum().item():.2%}"
        return None

    said = fault(got)
    assert said is None, f"{what}: {said}"
    if largest > 0:
        for factor in (1 + SEEN, 1 - SEEN):
            assert fault(wanted * factor), f"{what}: the bound is too wide to see an error of {SEEN:.0%}"


def assert_all_close(
    got: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    terms: float,
    *,
    dtype: torch.dtype | None = None,
    reach: Mapping[str, Tensor] | None = None,
) -> None:
    """`assert_sums_close` for tensors by name; the names must be the same."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_sums_close(got[name], value, terms, name, dtype=dtype, reach=(reach or {}).get(name, 0.0))


def adam_reach(square: Tensor, lr: float, error: float) -> Tensor:
    """How far rounding in a gradient may move each weight when Adam takes a step at the rate `lr`.

    Adam divides a mean of gradients by the root of a mean of their squares. Where the gradient of an entry is itself
    little more than the rounding of its tensor's (the K part of a qkv bias is nothing else, softmax cancels it), the
    quotient is noise and moves the weight by up to `lr`, either way. Numerator and denominator are off by `error` each
    at most, and two results that both moved by the whole rate may be 2 apart: lr * min(2, 2 * error / sqrt(square)).
    An entry that never had a gradient has no rounding either.

    Args: square: second moments, bias-corrected; error: `entry_bound` of the gradient.
    """
    return torch.where(square > 0, lr * (2 * error / square.sqrt()).clamp(max=2), 0.0)


class AdamReach:
    """`adam_reach` over the steps of a training, by name.

    In float32 every step builds on the sums of all before it, and what it moves comes on top. In bfloat16 what a step
    inherits is little beside its own roundings, which are independent of those of other steps: the root of the squares.
    """

    def __init__(self, model: nn.Module, terms: float, dtype: torch.dtype) -> None:
        self.terms, self.dtype, self.steps = terms, dtype, 0
        self.names = {p: name for name, p in model.named_parameters()}
        self.by_name: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}

    def step(self, optimizer: torch.optim.AdamW, lr: float) -> None:
        """After an update, while its gradients are there."""
        self.steps += 1
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    name = self.names[p]
                    self._largest[name] = largest = max(self._largest.get(name, 0.0), p.grad.abs().max().item())
                    half = self.dtype in HALF
                    error = entry_bound(self.terms * (1 if half else self.steps), largest, self.dtype)
                    square = optimizer.state[p]["exp_avg_sq"].double() / (1 - group["betas"][1] ** self.steps)
                    moved, before = adam_reach(square, lr, error), self.by_name.get(name, torch.zeros_like(square))
                    self.by_name[name] = torch.hypot(before, moved) if half else before + moved


def _wide(values: Values) -> Tensor:
    return torch.as_tensor(values).detach().double().cpu()


def transformer_terms(*, width: int, inner: int, head: int, layers: int, longest: int) -> int:
    """`terms` through the blocks of a transformer: norms, products and attention over `longest` tokens of one item."""
    return layers * (6 * width + head + 2 * longest + 2 * inner)


def encoder_terms(config: EncoderConfig, longest: int) -> int:
    """`terms` of a token of UniViTAR, from 1176 values of a patch to the last block; `longest`: tokens of an item."""
    width = config.hidden_size
    blocks = {"inner": config.intermediate_size, "head": width // config.num_attention_heads}
    return 1176 + transformer_terms(width=width, layers=config.num_hidden_layers, longest=longest, **blocks)


STORED = 12
"""Tensors that a block stores one after another: norm, qkv, q and k, attention, projection, residual; norm, both parts
of the feed-forward, gated norm, projection, residual."""


def gradient_terms(forward: int, rows: int) -> int:
    """`terms` of a parameter's gradient: the way there, the same sums on the way back, and the sum over all rows."""
    return 2 * forward + rows
