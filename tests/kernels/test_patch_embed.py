"""The kernels of patch_embed against the definition in float64, and the arithmetic around them."""

import dataclasses
from functools import partial

import pytest
import torch

from tests.kernels.patch_embed_cases import (
    PACKS,
    Pack,
    assert_gradients_close,
    assert_tokens_close,
    gradients,
    pack,
    parameters,
    truth,
    truth_of_stored,
)
from tests.support.closeness import assert_all_close, assert_sums_close
from tests.support.golden import golden
from univitar_ds import Preprocessor, UniViTAR
from univitar_ds.kernels import patch_embed as kernel
from univitar_ds.kernels import reference
from univitar_ds.model.blocks import layers

# Widths above one tile, of no power of two, and odd.
CASES = [
    *((name, 40, torch.bfloat16) for name in PACKS),
    ("stills", 150, torch.bfloat16),
    ("stills", 70, torch.float32),
    ("stills and videos", 7, torch.float32),
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
    wanted_of = partial(truth_of_stored, paired=True, offset=False) if dtype == torch.bfloat16 else truth
    exact = wanted_of(case, weight, bias, grad)
    tokens, grads = gradients(embed, case, weight, bias, grad)
    assert {tokens.dtype, *(x.dtype for x in grads)} == {dtype}
    assert_tokens_close(tokens, exact)
    assert_gradients_close(grads, exact, case.tokens)


@pytest.mark.kernels
def test_the_bias_may_be_missing_and_pixels_may_start_at_an_odd_address(embed):
    case, (weight, _) = pack("stills"), parameters(24, torch.float32)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), case.pixels])[1:]
    grad = torch.ones(case.tokens, 24)
    exact = truth(case, weight, None, grad)
    odd = dataclasses.replace(case, pixels=shifted)
    tokens, grads = gradients(embed, odd, weight, None, grad)
    assert_tokens_close(tokens, exact)
    assert_gradients_close(grads, exact, case.tokens)


@pytest.mark.kernels
def test_splits_of_the_sum_over_tokens_leave_nothing_out(embed, monkeypatch):
    monkeypatch.setattr(kernel, "WAVE", 1000)
    monkeypatch.setattr(kernel, "PART_TOKENS", 0)  # as many splits as there are steps
    case, (weight, bias) = pack("stills"), parameters(8, torch.float32)
    assert case.tokens % 32
    grad = torch.randn(case.tokens, 8, generator=torch.Generator().manual_seed(1))
    exact = truth(case, weight, bias, grad)
    _, grads = gradients(embed, case, weight, bias, grad)
    assert_gradients_close(grads, exact, case.tokens)


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
            assert -(-tokens // span) <= max(8, 132 // tiles, -(-tokens // 2**20))
            assert span <= 2**20


@pytest.mark.parametrize("tokens", [8192, 16384, 65536])
@pytest.mark.parametrize("width", [1024, 1280, 1920])
@pytest.mark.parametrize("rows", [5, 10])
def test_splits_of_the_models_gradients_fill_the_waves_of_programs(rows, width, tokens):
    """Rows of tiles: 5 of stills, 10 of videos."""
    tiles = rows * -(-width // 256)
    programs = tiles * -(-tokens // kernel.split_span(tokens, tiles, 64))
    assert programs / (-(-programs // 132) * 132) >= 0.9


def test_few_tokens_are_not_split_for_parts_that_cost_more_than_their_products():
    assert kernel.split_span(512, 80, 64) == 512


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
    assert_sums_close(states[0], numbers.hidden_states[0], terms=1176)
    assert_sums_close(output, numbers.last_hidden_state, numbers.terms)
    ((output * numbers.loss_weight.to(device)).sum() / output.numel()).backward()
    grads = {name: p.grad for name, p in model.embeddings.named_parameters(prefix="embeddings")}
    assert_all_close(grads, {name: numbers.grads[name] for name in grads}, numbers.gradient_terms)


def exact_case(kind: str, tokens: int, width: int, device: str) -> tuple[Pack, dict, tuple[torch.Tensor, ...], tuple]:
    """A pack of whole numbers: pack, rule, (weight, bias, gradient of the tokens), and what must come of it."""
    side = int((tokens // 4) ** 0.5)
    grids = [(1, side, side)] * 4 if kind == "stills" else [(2, side, side)] * 2
    frames = [1 if kind == "stills" else 4] * len(grids)
    generator = torch.Generator().manual_seed(tokens)
    size = sum(count * h * w * 588 for count, (_, h, w) in zip(frames, grids, strict=True))
    pixels = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(device)
    small = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to(device)  # noqa: E731
    weight, bias, grad = small(width, 3, 2, 14, 14), small(width), small(4 * side * side, width)
    # (byte / 255 - mean) / std = byte - 128: every sum is one of whole numbers below 2^24, exact in any order.
    rule = {"mean": (128 / 255,) * 3, "std": (1 / 255,) * 3, "merge": 1}
    rows = reference.patchify(pixels, frames, grids, 1).double() - 128
    wanted = (
        rows @ weight.double().flatten(1).T + bias,
        (grad.double().T @ rows).view(weight.shape),
        grad.double().sum(0),
    )
    return Pack(pixels, frames, grids, 1), rule, (weight, bias, grad), wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter has no asynchronous products")
@pytest.mark.parametrize("width", [1280, 1920])
@pytest.mark.parametrize("kind", ["stills", "clips"])
def test_whole_numbers_are_multiplied_exactly_every_time(kind, width):
    """A product that reads what the next step has written would be wrong by far, but only in some runs."""
    case, rule, values, wanted = exact_case(kind, 16384, width, "cuda")
    weight, bias, grad = (value.bfloat16() for value in values)
    weight.requires_grad_()
    bias.requires_grad_()
    for _ in range(10):
        tokens = kernel.patch_embed(case.pixels, case.frames, case.grids, weight, bias, **rule)
        got = (tokens, *torch.autograd.grad(tokens, (weight, bias), grad))
        for ours, exact in zip(got, wanted, strict=True):
            assert torch.equal(ours, exact.to(torch.bfloat16))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["stills", "clips"])
def test_whole_numbers_are_multiplied_exactly_in_float32(device, kind):
    case, rule, values, wanted = exact_case(kind, 64, 40, device)
    weight, bias, grad = (value.float() for value in values)
    weight.requires_grad_()
    bias.requires_grad_()
    tokens = kernel.patch_embed(case.pixels, case.frames, case.grids, weight, bias, **rule)
    got = (tokens, *torch.autograd.grad(tokens, (weight, bias), grad))
    for ours, exact in zip(got, wanted, strict=True):
        assert torch.equal(ours, exact.float())
