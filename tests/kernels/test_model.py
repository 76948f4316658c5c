"""The whole encoder on the kernels: the released encoder's numbers, and those of the reference."""

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.golden import assert_loss_close, golden
from univitar_ds import UniViTAR
from univitar_ds.kernels import dispatch

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
    assert_loss_close(loss, numbers)
    assert_loss_close(plain_loss, numbers)
    for wanted in (numbers.last_hidden_state, plain_output):
        assert_sums_close(output, wanted, numbers.terms)
    for wanted in (numbers.grads, plain_grads):
        assert_all_close(grads, wanted, numbers.gradient_terms)
