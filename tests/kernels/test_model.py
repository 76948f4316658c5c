"""The whole encoder on the kernels: the released encoder's numbers, and those of the reference."""

import pytest
import torch

from kernels import dispatch
from tests.support.golden import golden
from univitar_ds import UniViTAR

pytestmark = pytest.mark.kernels


def run(monkeypatch, device: str, kernels: str, checkpoint_every: int = 0):
    """Output, loss and gradients of the golden encoder."""
    monkeypatch.setenv(dispatch.VARIABLE, kernels)
    dispatch.implementation.cache_clear()
    numbers = golden("merge2")
    model = UniViTAR.from_pretrained(numbers.folder, attention="sdpa", checkpoint_every=checkpoint_every).to(device)
    output = model(numbers.pixel_values.to(device), numbers.grid_thw)
    loss = (output * numbers.loss_weight.to(device)).sum() / output.numel()
    loss.backward()
    monkeypatch.undo()
    dispatch.implementation.cache_clear()
    return output.detach(), loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_the_encoder_on_kernels_is_the_released_one_and_the_references(device, monkeypatch):
    numbers = golden("merge2")
    output, loss, grads = run(monkeypatch, device, "triton")
    plain_output, plain_loss, plain_grads = run(monkeypatch, device, "reference")
    assert not torch.equal(output, plain_output), "the same bits: one of them did not run"
    assert loss == pytest.approx(numbers.loss, abs=1e-7)
    assert loss == pytest.approx(plain_loss, abs=1e-7)
    for wanted in (numbers.last_hidden_state.to(device), plain_output):
        torch.testing.assert_close(output, wanted, rtol=0, atol=2e-5)
    assert grads.keys() == numbers.grads.keys()
    for name, grad in grads.items():
        for wanted in (numbers.grads[name].to(device), plain_grads[name]):
            error = (grad - wanted).abs().max() / wanted.abs().max()
            assert error <= 1e-4, f"{name}: {error:.1e} of its largest entry"
