"""A kernel beside the reference in float64, given the same inputs and the same upstream gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.support.closeness import assert_sums_close
from univitar_ds.kernels import reference


def drawn(*shape: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype).requires_grad_()


def assert_follows_reference(
    kernel: Callable, reference: Callable, inputs: Sequence[Tensor], terms: int, angle: float = 0.0
) -> None:
    """Outputs and the gradients of all `inputs` of kernel(*inputs) against reference(*inputs) in float64.

    `terms` of a sum; `angle`: by how much a turn of its inputs may be off, in radians.
    """
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
        assert_turned_close(ours, theirs, terms, angle, f"output {i}")
    for i, (ours, theirs) in enumerate(zip(got_grads, wanted_grads, strict=True)):
        assert ours.dtype == inputs[i].dtype
        assert_turned_close(ours, theirs, terms, angle, f"gradient of input {i}")


def assert_turned_close(got: Tensor, wanted: Tensor, terms: int, angle: float, what: str) -> None:
    """`assert_sums_close` where values were turned by an angle that may be off: by as much of the largest of them."""
    assert_sums_close(got, wanted, terms, what, reach=angle * wanted.abs().max().item() if wanted.numel() else 0.0)


def add_norm_of(stored: Tensor) -> Callable:
    """The reference of add_norm, but normed is the sum as it was stored: every value of it was rounded once before."""

    def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = torch.addcmul(x, branch, scale)
        rounded = total + (stored.to(total.dtype) - total).detach()
        return total, reference.rms_norm(rounded, weight, eps)

    return add_norm


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)
