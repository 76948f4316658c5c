import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.closeness import assert_sums_close
from tests.support.dense import dense_sigmoid, dense_softmax
from univitar_ds.errors import PluginError
from univitar_ds.objectives.pairs import check_additive, loss_of_pairs, pair_losses
from univitar_ds.objectives.sigmoid import sigmoid_loss
from univitar_ds.objectives.softmax import softmax_loss


def weighted(images, texts, scale, bias, positives):
    """A loss as a plugin gives it: of positive pairs three times that of others."""
    logits = images @ texts.T * scale + bias
    return (3 * F.softplus(-logits) * positives + F.softplus(logits) * ~positives).sum()


def weighted_loss(*inputs, **settings):
    return loss_of_pairs(pair_losses(weighted), *inputs, **settings)


def dense_weighted(vision, text, scale, bias, ids=None):
    positive = torch.eye(len(vision), dtype=torch.bool) if ids is None else ids[:, None] == ids[None]
    return weighted(vision, text, scale, bias, positive) / max(len(vision), 1)


DENSE = {sigmoid_loss: dense_sigmoid, softmax_loss: dense_softmax, weighted_loss: dense_weighted}
both_losses = pytest.mark.parametrize("loss_of", DENSE)


def embeddings(n: int, *, width: int = 16, captions: int = 10**6, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    vision, text = (F.normalize(torch.randn(n, width, generator=g), dim=-1) for _ in range(2))
    return vision, text, torch.randint(0, captions, (n,), generator=g)


def dense_gradients(loss_of, vision, text, scale, bias, ids=None):
    leaves = [x.double().clone().requires_grad_() for x in (vision, text, scale, bias)]
    loss = DENSE[loss_of](*leaves, ids)
    return loss.item(), torch.autograd.grad(loss, leaves)


def terms(items: int) -> int:
    """A logit sums 16 products; the loss sums those of all pairs, and so does the gradient of the scale."""
    return 16 + items * items


SCALE, BIAS = torch.tensor([7.3]), torch.tensor([-4.1])


@pytest.mark.numeric
@both_losses
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
def test_loss_and_gradients_are_those_of_the_dense_formula_for_any_chunk(loss_of, chunk, same):
    vision, text, ids = embeddings(23, captions=6)
    result = loss_of(vision, text, SCALE, BIAS, ids, chunk=chunk, same_caption_positive=same)
    loss, grads = dense_gradients(loss_of, vision, text, SCALE, BIAS, ids if same else None)
    assert result.items == 23
    assert_sums_close(result.loss, loss, terms(23), "loss")
    ours = (result.vision_grad, result.text_grad, result.scale_grad, result.bias_grad)
    for got, wanted in zip(ours, grads, strict=True):
        assert_sums_close(got, wanted, terms(23), "gradient")


@both_losses
@pytest.mark.parametrize("same", [False, True])
def test_gradients_are_those_of_the_dense_formula_in_float64_to_a_millionth(loss_of, same):
    """On this processor: others add up in another order, for which the test above has room."""
    vision, text, ids = embeddings(23, captions=6)
    result = loss_of(vision, text, SCALE, BIAS, ids, chunk=7, same_caption_positive=same)
    _, grads = dense_gradients(loss_of, vision, text, SCALE, BIAS, ids if same else None)
    ours = (result.vision_grad, result.text_grad, result.scale_grad, result.bias_grad)
    for got, wanted in zip(ours, grads, strict=True):
        assert (got.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.numeric
@both_losses
def test_equal_captions_count_as_negatives_unless_asked(loss_of):
    vision, text, _ = embeddings(6)
    ids = torch.zeros(6, dtype=torch.int64)
    apart = loss_of(vision, text, SCALE, BIAS, ids, chunk=4)
    alike = loss_of(vision, text, SCALE, BIAS, ids, chunk=4, same_caption_positive=True)
    assert_sums_close(apart.loss, dense_gradients(loss_of, vision, text, SCALE, BIAS)[0], terms(6))
    assert_sums_close(alike.loss, dense_gradients(loss_of, vision, text, SCALE, BIAS, ids)[0], terms(6))
    assert abs(alike.loss - apart.loss) > 1e-3 * apart.loss


@both_losses
def test_a_step_without_any_item_has_loss_zero_and_no_gradient(loss_of):
    vision, text, ids = embeddings(0)
    result = loss_of(vision, text, SCALE, BIAS, ids, chunk=8)
    assert (result.loss, result.items) == (0.0, 0)
    assert result.vision_grad.shape == result.text_grad.shape == (0, 16)
    assert result.scale_grad.item() == result.bias_grad.item() == 0.0


@both_losses
def test_the_same_call_gives_the_same_bits(loss_of):
    vision, text, ids = embeddings(31)
    one, two = (loss_of(vision, text, SCALE, BIAS, ids, chunk=9) for _ in range(2))
    assert one.loss == two.loss
    assert torch.equal(one.vision_grad, two.vision_grad)
    assert torch.equal(one.text_grad, two.text_grad)


@both_losses
def test_a_value_that_is_not_finite_makes_the_loss_not_finite(loss_of):
    vision, text, ids = embeddings(5)
    vision[2, 3] = float("nan")
    assert not math.isfinite(loss_of(vision, text, SCALE, BIAS, ids, chunk=2).loss)


def test_a_sum_over_pairs_passes_the_check():
    check_additive(pair_losses(weighted))


@pytest.mark.parametrize(
    ("loss_of_chunk", "said"),
    [
        (lambda *block: weighted(*block).div(block[4].numel()), "without a mean or a softmax"),
        (lambda v, t, s, b, p: -(v @ t.T * s).softmax(1)[p].sum(), "without a mean or a softmax"),
        (lambda v, t, s, b, p: (v @ t.T).sqrt().sum(), "is nan; it must be a finite"),
        (lambda v, t, s, b, p: v @ t.T, r"returned \[6, 8\], not a tensor of one number"),
        (lambda v, t, s, b, p: 0.5, "returned float, not a tensor of one number"),
        (lambda v, t, s, b, p: (v @ t.T).detach().sum(), "without a gradient"),
    ],
)
def test_a_loss_that_is_not_a_sum_over_pairs_is_refused(loss_of_chunk, said):
    with pytest.raises(PluginError, match=said):
        check_additive(pair_losses(loss_of_chunk))


def test_a_loss_that_does_not_use_all_of_its_arguments_has_no_gradient_of_the_others():
    vision, text, ids = embeddings(5)
    loss = pair_losses(lambda images, texts, scale, bias, positives: (images @ texts.T * ~positives).sum())
    result = loss_of_pairs(loss, vision, text, SCALE, BIAS, ids, chunk=2)
    assert result.vision_grad.any()
    assert result.scale_grad.item() == result.bias_grad.item() == 0.0
