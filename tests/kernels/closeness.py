"""How near a kernel must come to the reference in float64, given the same inputs and the same upstream gradients.

An entry may miss by the rounding of its type relative to itself, and by `slack` relative to the largest entry, for
what float32 arithmetic before it loses. Types: float32 rounds by 2^-24; bfloat16 by 2^-8, but Triton's interpreter
cuts it off instead, which is 2^-7.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SUMS = 2**-20
"""Slack of the norms: sums of up to a few thousand products and a handful of operations, 16 roundings of 2^-24."""


def drawn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def rounding(dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 2**-24
    return 2**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2**-8


def assert_near(got: Tensor, wanted: Tensor, slack: float, what: str, roundings: int = 1) -> None:
    assert got.shape == wanted.shape, what
    if not got.numel():
        return
    error = (got.double() - wanted).abs()
    limit = roundings * rounding(got.dtype) * wanted.abs() + slack * wanted.abs().max()
    worst = (error / limit).argmax()
    assert (error <= limit).all(), (
        f"{what}: {got.flatten()[worst]:.8g} instead of {wanted.flatten()[worst]:.8g} at {worst}, "
        f"{(error / limit).max():.3g} times what is allowed"
    )


def assert_follows_reference(
    kernel: Callable, reference: Callable, inputs: Sequence[Tensor], slack: float, roundings: int = 1
) -> None:
    """Outputs and the gradients of all `inputs` of kernel(*inputs) against reference(*inputs) in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, wanted = _tuple(kernel(*inputs)), _tuple(reference(*exact))
    upstream = [
        drawn(*output.shape, seed=90 + i, device=output.device.type, dtype=output.dtype).detach()
        for i, output in enumerate(got)
    ]
    got_grads = torch.autograd.grad(got, inputs, upstream)
    wanted_grads = torch.autograd.grad(wanted, exact, [gradient.double() for gradient in upstream])
    for i, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert ours.dtype == inputs[0].dtype
        assert_near(ours, theirs, slack, f"output {i}", roundings)
    for i, (ours, theirs) in enumerate(zip(got_grads, wanted_grads, strict=True)):
        assert ours.dtype == inputs[i].dtype
        assert_near(ours, theirs, slack, f"gradient of input {i}", roundings)


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
