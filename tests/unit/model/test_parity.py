"""The encoder gives the released encoder's numbers: values, every hidden state, every gradient."""

import pytest
import torch

from tests.support.golden import CASES, golden
from univitar_ds import Preprocessor, UniViTAR

pytestmark = pytest.mark.parametrize("case", CASES)


def test_pixel_values_and_grids_are_the_releases(case):
    numbers = golden(case)
    pixel_values, grid_thw = Preprocessor.from_pretrained(numbers.folder)(numbers.items())
    assert torch.equal(grid_thw, numbers.grid_thw)
    assert pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values, numbers.pixel_values, rtol=0, atol=2e-6)


def test_hidden_states_and_output_are_the_releases(case):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder)
    output, states = model(numbers.pixel_values, numbers.grid_thw, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(states), numbers.hidden_states, rtol=0, atol=2e-5)
    torch.testing.assert_close(output, numbers.last_hidden_state, rtol=0, atol=2e-5)


@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_loss_and_every_gradient_are_the_releases(case, checkpoint_every):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder, checkpoint_every=checkpoint_every)
    output = model(numbers.pixel_values, numbers.grid_thw)
    loss = (output * numbers.loss_weight).sum() / output.numel()
    assert loss.item() == pytest.approx(numbers.loss, abs=1e-7)
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert set(grads) == set(numbers.grads)
    for name, wanted in numbers.grads.items():
        error = (grads[name] - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-4, f"{name}: {error:.1e} of its largest entry"


def test_from_the_bytes_of_the_pixels_values_and_gradients_are_the_releases(case):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder)
    pixels, frames, grids = Preprocessor.from_pretrained(numbers.folder).pixels(numbers.items())
    output, states = model(pixels, grids, frames=frames, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(states), numbers.hidden_states, rtol=0, atol=2e-5)
    ((output * numbers.loss_weight).sum() / output.numel()).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - numbers.grads[name]).abs().max() / numbers.grads[name].abs().max()
        assert error <= 1e-4, f"{name}: {error:.1e} of its largest entry"


def test_the_whole_way_from_pictures_to_tokens_is_the_releases(case):
    numbers = golden(case)
    tokens = UniViTAR.from_pretrained(numbers.folder)(*Preprocessor.from_pretrained(numbers.folder)(numbers.items()))
    torch.testing.assert_close(tokens, numbers.last_hidden_state, rtol=0, atol=2e-5)
