"""The kernels of patch_embed against the definition in float64, and the arithmetic around them."""

import dataclasses

import pytest
import torch

from kernels import patch_embed as kernel
from tests.kernels.closeness import rounding
from tests.kernels.patch_embed_cases import PACKS, SINGLE, Pack, assert_near, gradients, pack, parameters, truth
from tests.support.golden import golden
from univitar_ds import Preprocessor, UniViTAR
from univitar_ds.model import layers

# Widths above one tile, of no power of two, and odd.
CASES = [
    *((name, 40, torch.bfloat16) for name in PACKS),
    ("stills", 150, torch.bfloat16),
    ("stills", 70, torch.float32),
    ("stills and clips", 7, torch.float32),
]


@pytest.fixture
def embed(device):
    """The operation on the device the kernels run on, with everything else on the CPU."""

    def run(pixels, frames, grids, weight, bias, **rule):
        weight, bias = (None if x is None else x.to(device) for x in (weight, bias))
        return kernel.patch_embed(pixels.to(device), frames, grids, weight, bias, **rule).cpu()

    return run


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "width", "dtype"), CASES)
def test_tokens_and_gradients_are_those_of_the_definition(embed, name, width, dtype):
    case, (weight, bias) = pack(name), parameters(width, dtype)
    grad = torch.randn(case.tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = truth(case, weight, bias, grad)
    tokens, (grad_weight, grad_bias) = gradients(embed, case, weight, bias, grad)
    last = rounding(dtype)
    assert tokens.dtype == grad_weight.dtype == grad_bias.dtype == dtype
    assert_near(tokens, exact.tokens, exact.tokens_size, last + SINGLE, last)
    assert_near(grad_weight, exact.weight, exact.weight_size, SINGLE, last)
    assert_near(grad_bias, exact.bias, exact.bias_size, SINGLE, last)


@pytest.mark.kernels
def test_the_bias_may_be_missing_and_pixels_may_start_at_an_odd_address(embed):
    case, (weight, _) = pack("stills"), parameters(24, torch.float32)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), case.pixels])[1:]
    grad = torch.ones(case.tokens, 24)
    exact = truth(case, weight, None, grad)
    odd = dataclasses.replace(case, pixels=shifted)
    tokens, (grad_weight, _) = gradients(embed, odd, weight, None, grad)
    assert_near(tokens, exact.tokens, exact.tokens_size, SINGLE, 0)
    assert_near(grad_weight, exact.weight, exact.weight_size, SINGLE, 0)


@pytest.mark.kernels
def test_splits_of_the_sum_over_tokens_leave_nothing_out(embed, monkeypatch):
    monkeypatch.setattr(kernel, "WAVE", 10**6)  # as many splits as there are steps
    case, (weight, bias) = pack("stills"), parameters(8, torch.float32)
    assert case.tokens % 32
    grad = torch.randn(case.tokens, 8, generator=torch.Generator().manual_seed(1))
    exact = truth(case, weight, bias, grad)
    _, (grad_weight, grad_bias) = gradients(embed, case, weight, bias, grad)
    assert_near(grad_weight, exact.weight, exact.weight_size, SINGLE, 0)
    assert_near(grad_bias, exact.bias, exact.bias_size, SINGLE, 0)


@pytest.mark.kernels
def test_a_frozen_weight_costs_no_gradient_and_the_same_call_gives_the_same_bits(embed):
    case, (weight, bias) = pack("blocks"), parameters(8, torch.bfloat16)
    first, second = (embed(case.pixels, case.frames, case.grids, weight, bias, **case.rule()) for _ in range(2))
    assert not first.requires_grad
    assert torch.equal(first, second)


@pytest.mark.kernels
def test_an_empty_pack_has_no_tokens_and_gradients_of_zero(embed):
    weight, bias = parameters(5, torch.float32)
    empty = Pack(torch.empty(0, dtype=torch.uint8), [], [], 1)
    tokens, grads = gradients(embed, empty, weight, bias, torch.empty(0, 5))
    assert tokens.shape == (0, 5)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("words", [16, 32])
@pytest.mark.parametrize("still", [True, False])
def test_steps_cover_the_words_of_a_patch(still, words):
    steps, tail = kernel.loop(still, words)
    left = (1 if still else 2) * 294 - steps * words
    assert 0 < left <= tail <= max(8, 2 * left)


def test_splits_are_whole_steps_that_cover_the_tokens_and_keep_offsets_within_32_bits():
    for tokens in (1, 63, 64, 65, 16384, 65536, 10**7):
        for tiles in (1, 5, 20, 80, 1000):
            span = kernel.split_span(tokens, tiles, 64)
            assert span % 64 == 0
            assert -(-tokens // span) <= max(1, 132 // tiles, -(-tokens // 2**20))
            assert span <= 2**20


def test_items_start_where_the_one_before_ends():
    table = kernel.item_table([1, 4, 1], [(1, 2, 3), (2, 1, 1), (1, 1, 1)])
    assert table == [[0, 0, 2, 3, 0], [6, 6 * 294, 1, 1, 1], [8, 6 * 294 + 4 * 294, 1, 1, 0]]


@pytest.mark.kernels
def test_an_encoder_with_the_kernels_gives_the_releases_numbers_from_bytes(device, monkeypatch):
    numbers = golden("merge2")
    monkeypatch.setattr(layers, "patch_embed", kernel.patch_embed)
    model = UniViTAR.from_pretrained(numbers.folder, attention="sdpa").to(device)
    pixels, frames, grids = Preprocessor.from_pretrained(numbers.folder).pixels(numbers.items())
    output, states = model(pixels.to(device), grids, frames=frames, output_hidden_states=True)
    torch.testing.assert_close(states[0].cpu(), numbers.hidden_states[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(output.cpu(), numbers.last_hidden_state, rtol=0, atol=2e-5)
    ((output * numbers.loss_weight.to(device)).sum() / output.numel()).backward()
    for key, parameter in model.embeddings.named_parameters(prefix="embeddings"):
        error = (parameter.grad.cpu() - numbers.grads[key]).abs().max() / numbers.grads[key].abs().max()
        assert error <= 1e-4, f"{key}: {error:.1e} of its largest entry"
