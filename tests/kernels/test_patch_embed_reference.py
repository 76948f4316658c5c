"""The reference of patch_embed: bytes to tokens and its gradients, against the definition in float64."""

import pytest
import torch

from tests.kernels.patch_embed_cases import (
    PACKS,
    assert_gradients_close,
    assert_tokens_close,
    gradients,
    pack,
    parameters,
    truth,
    truth_of_stored,
)
from tests.support.closeness import assert_sums_close
from univitar_ds.kernels import reference

RULE = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "merge": 1}


@pytest.mark.numeric
@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("batch", [2048, 5])
def test_the_reference_is_the_definition_in_float64(name, batch, monkeypatch):
    monkeypatch.setattr(reference, "BATCH", batch)
    case, (weight, bias) = pack(name), parameters(9, torch.float64)
    grad = torch.randn(case.tokens, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = truth(case, weight, bias, grad)
    tokens, grads = gradients(reference.patch_embed, case, weight, bias, grad)
    assert_tokens_close(tokens, exact)
    assert_gradients_close(grads, exact, case.tokens)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["stills", "stills and videos", "blocks"])
def test_in_half_precision_weights_and_results_are_rounded_once_and_pixels_never(name):
    case, (weight, bias) = pack(name), parameters(33, torch.bfloat16)
    grad = torch.randn(case.tokens, 33, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = truth_of_stored(case, weight, bias, grad, paired=False, offset=True)
    tokens, (grad_weight, grad_bias) = gradients(reference.patch_embed, case, weight, bias, grad)
    assert tokens.dtype == grad_weight.dtype == grad_bias.dtype == torch.bfloat16
    assert_tokens_close(tokens, exact)
    # On the CPU the product of a batch is stored too, before the folding is taken out.
    assert_sums_close(grad_weight, exact.weight, 2, "gradient of the weight", dtype=torch.bfloat16)
    assert_sums_close(grad_bias, exact.bias, case.tokens, "gradient of the bias")


@pytest.mark.numeric
def test_a_still_is_a_video_of_two_equal_frames():
    still, (weight, bias) = pack("stills"), parameters(9, torch.float64)
    parts = still.pixels.split([h * w * 588 for _, h, w in still.grids])
    doubled = torch.cat([part.repeat(2) for part in parts])
    once = reference.patch_embed(still.pixels, still.frames, still.grids, weight, bias, **still.rule())
    twice = reference.patch_embed(doubled, [2] * len(parts), still.grids, weight, bias, **still.rule())
    assert_sums_close(once, twice, 1176)


@pytest.mark.numeric
def test_gradients_equal_finite_differences():
    case, (weight, bias) = pack("one token"), parameters(2, torch.float64)
    function = lambda w, b: reference.patch_embed(case.pixels, case.frames, case.grids, w, b, **case.rule())  # noqa: E731
    assert torch.autograd.gradcheck(function, (weight.requires_grad_(), bias.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("with_bias", [True, False])
def test_an_empty_pack_has_no_tokens_and_gradients_of_zero(with_bias):
    weight, bias = (x.requires_grad_() for x in parameters(5, torch.float32))
    bias = bias if with_bias else None
    empty = torch.empty(0, dtype=torch.uint8)
    tokens = reference.patch_embed(empty, [], [], weight, bias, **RULE)
    assert tokens.shape == (0, 5)
    tokens.sum().backward()
    assert not weight.grad.any()
    assert bias is None or not bias.grad.any()


def test_the_largest_tensor_it_makes_is_a_batch_of_bytes(monkeypatch):
    monkeypatch.setattr(reference, "BATCH", 8)
    made, empty = [], torch.empty
    monkeypatch.setattr(reference.torch, "empty", lambda *size, **kw: made.append(size) or empty(*size, **kw))
    case, (weight, _) = pack("stills"), parameters(3, torch.float32)
    reference.patch_embed(case.pixels, case.frames, case.grids, weight, None, **case.rule())
    # Nine tokens stand in one row of blocks: two frames of them is the least room there may be.
    assert made == [(9 * 1176,)]


def test_pixels_that_do_not_fill_the_grids_are_a_bug_and_raise():
    weight, _ = parameters(2, torch.float32)
    with pytest.raises(ValueError, match="pixel bytes"):
        reference.patch_embed(torch.zeros(2 * 588, dtype=torch.uint8), [1], [(1, 1, 1)], weight, None, **RULE)
