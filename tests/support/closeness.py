"""Comparison of results of floating-point sums: one rule with one constant.

    |got - wanted| <= C * eps(dtype) * sqrt(terms) * scale        for every entry

`eps` is that of the type in which the sums are accumulated, `scale` the largest absolute value of the expected tensor,
and `terms` the number of summands of an entry; for sums of sums, as in the layers of a model, the number on the longest
path. The order of summation depends on the processor, its instruction set and the number of threads; the bound does
not.

Why C is 4. A rounding error is between -eps/2 and eps/2 of a partial sum: 0.29 eps in the root mean square. A sum of
n terms has n independent ones: 0.29 eps sqrt(n). The largest of ten thousand entries is at 4 standard deviations, and
the difference of two results is sqrt(2) times as large: 1.6 eps sqrt(n) of a partial sum, which is at most about as
large as `scale`. The remaining factor of 2.5 is for operations between the sums of a model (norms, softmaxes,
activations, which may increase a relative error) and for terms that cancel. Measured, with vectors of 16, 8 and 1
numbers and 1 to 4 threads: at most 1.1 for a few terms and 0.5 in models, whose sums are computed in parts.

bfloat16 and float16 are storage types: sums are accumulated in float32, so `eps` is that of float32, and an entry is
rounded once, by `rounding(dtype)`, when it is stored. If all intermediate tensors are stored in such a type (a model in
bfloat16), storing them causes most of the error: then dtype=torch.bfloat16, and `terms` is the number of tensors on the
longest path, divided by the number of entries with independent errors of which the result is a mean. One entry may then
be wrong by several percent. But the errors are independent, so they cancel over the whole tensor:
|<got - wanted, wanted>| is at most the 2-norm of bounds * wanted, which detects an error that all entries share.

Every comparison checks that it can fail: the bound must reject the expected values scaled by 1.01 and by 0.99.
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
"""A relative error that every comparison must detect."""
HALF = (torch.bfloat16, torch.float16)
Values = Tensor | float | Sequence[float]


def rounding(dtype: torch.dtype) -> float:
    """Relative error of storing a value: eps / 2, or eps for bfloat16 in Triton's interpreter, which truncates."""
    truncates = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return torch.finfo(dtype).eps / (1 if truncates else 2)


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
    """Check that `got` equals `wanted` up to the order of sums of `terms` numbers.

    Args:
        dtype: type in which the sums are accumulated; default: that of `got`, or float32 if `got` has 16 bits.
        scale: default: the largest absolute value of `wanted`. If `wanted` is a small difference of large numbers, the
            largest of those.
        reach: additional tolerance, e.g. `adam_reach`; a scalar or of the shape of `wanted`.

    Raises: AssertionError, also if the bound is too wide to detect an error of 1 %.
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
        if not (error <= limit).all():  # also true for NaN
            place = (error / limit).nan_to_num(torch.inf).argmax()
            found, right = values.flatten()[place].item(), wanted.flatten()[place].item()
            times = (error / limit).flatten()[place].item()
            return f"{found:.8g} instead of {right:.8g} at {place.item()}, {times:.3g} times what is allowed"
        along = ((values - wanted) * wanted).sum().abs().item()
        if dtype in HALF and along > (limit * wanted).norm().item():
            return f"all entries together are wrong by {along / wanted.square().sum().item():.2%}"
        return None

    found = fault(got)
    assert found is None, f"{what}: {found}"
    if largest > 0:
        for factor in (1 + SEEN, 1 - SEEN):
            assert fault(wanted * factor), f"{what}: the bound is too wide to detect an error of {SEEN:.0%}"


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
    """Bound on the change of each weight by rounding errors of its gradient in a step of Adam with learning rate `lr`.

    Adam divides a mean of gradients by the root of a mean of their squares. If the gradient of an entry is not much
    larger than the rounding error of its tensor (the K part of a qkv bias is only rounding error, because softmax
    cancels it), the quotient is noise and moves the weight by up to `lr` in either direction. Numerator and denominator
    are each wrong by at most `error`, and two results can differ by 2 * lr: lr * min(2, 2 * error / sqrt(square)).
    An entry that never had a gradient has no rounding error.

    Args: square: second moments, bias-corrected; error: `entry_bound` of the gradient.
    """
    return torch.where(square > 0, lr * (2 * error / square.sqrt()).clamp(max=2), 0.0)


class AdamReach:
    """`adam_reach` accumulated over the steps of a training, by parameter name.

    In float32 the errors of all steps add up, because each step continues from the results of the previous ones. In
    bfloat16 a step's own rounding errors dominate, which are independent, so the root of the sum of squares is used.
    """

    def __init__(self, model: nn.Module, terms: float, dtype: torch.dtype) -> None:
        self.terms, self.dtype, self.steps = terms, dtype, 0
        self.names = {p: name for name, p in model.named_parameters()}
        self.by_name: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}

    def step(self, optimizer: torch.optim.AdamW, lr: float) -> None:
        """Call it after an optimizer step, before its gradients are cleared."""
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
    """`terms` of the blocks of a transformer: norms, products and attention over `longest` tokens of one item."""
    return layers * (6 * width + head + 2 * longest + 2 * inner)


def encoder_terms(config: EncoderConfig, longest: int) -> int:
    """`terms` of a token of UniViTAR, from 1176 values of a patch to the last block; `longest`: tokens of an item."""
    width = config.hidden_size
    blocks = {"inner": config.intermediate_size, "head": width // config.num_attention_heads}
    return 1176 + transformer_terms(width=width, layers=config.num_hidden_layers, longest=longest, **blocks)


STORED = 12
"""Tensors that a block stores in sequence: norm, qkv, q and k, attention, projection, residual; norm, both parts of the
feed-forward, gated norm, projection, residual."""


def gradient_terms(forward: int, rows: int) -> int:
    """`terms` of a parameter's gradient: the forward pass, the same sums in the backward pass, the sum over rows."""
    return 2 * forward + rows
