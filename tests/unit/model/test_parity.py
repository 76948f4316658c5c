"""The encoder has the released encoder's numbers: outputs, every hidden state, every gradient."""

import pytest
import torch

from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.golden import CASES, assert_loss_close, golden
from univitar_ds import Preprocessor, UniViTAR

pytestmark = pytest.mark.parametrize("case", CASES)


@pytest.mark.numeric
def test_pixel_values_and_grids_are_the_releases(case):
    numbers = golden(case)
    pixel_values, grid_thw = Preprocessor.from_pretrained(numbers.folder)(numbers.items())
    assert torch.equal(grid_thw, numbers.grid_thw)
    assert pixel_values.dtype == torch.float32
    assert_sums_close(pixel_values, numbers.pixel_values, terms=3)  # divided, shifted and scaled


@pytest.mark.numeric
def test_hidden_states_and_output_are_the_releases(case):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder)
    output, states = model(numbers.pixel_values, numbers.grid_thw, output_hidden_states=True)
    assert len(states) == len(numbers.hidden_states)
    for state, wanted in zip(states, numbers.hidden_states, strict=True):
        assert_sums_close(state, wanted, numbers.terms)
    assert_sums_close(output, numbers.last_hidden_state, numbers.terms)


@pytest.mark.numeric
@pytest.mark.parametrize("checkpoint_every", [0, 1, 2])
def test_loss_and_every_gradient_are_the_releases(case, checkpoint_every):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder, checkpoint_every=checkpoint_every)
    output = model(numbers.pixel_values, numbers.grid_thw)
    loss = (output * numbers.loss_weight).sum() / output.numel()
    assert_loss_close(loss.item(), numbers)
    loss.backward()
    assert_all_close({n: p.grad for n, p in model.named_parameters()}, numbers.grads, numbers.gradient_terms)


@pytest.mark.numeric
def test_from_the_bytes_of_the_pixels_values_and_gradients_are_the_releases(case):
    numbers = golden(case)
    model = UniViTAR.from_pretrained(numbers.folder)
    pixels, frames, grids = Preprocessor.from_pretrained(numbers.folder).pixels(numbers.items())
    output, states = model(pixels, grids, frames=frames, output_hidden_states=True)
    assert len(states) == len(numbers.hidden_states)
    for state, wanted in zip(states, numbers.hidden_states, strict=True):
        assert_sums_close(state, wanted, numbers.terms)
    ((output * numbers.loss_weight).sum() / output.numel()).backward()
    assert_all_close({n: p.grad for n, p in model.named_parameters()}, numbers.grads, numbers.gradient_terms)


@pytest.mark.numeric
def test_the_whole_way_from_images_to_tokens_is_the_releases(case):
    numbers = golden(case)
    tokens = UniViTAR.from_pretrained(numbers.folder)(*Preprocessor.from_pretrained(numbers.folder)(numbers.items()))
    assert_sums_close(tokens, numbers.last_hidden_state, numbers.terms)
