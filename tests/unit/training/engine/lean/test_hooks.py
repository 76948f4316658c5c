"""The linear layer of ZeRO-3 has the same bits as DeepSpeed's, forward and backward."""

import pytest
import torch

from univitar_ds.training.engine.engine import load_deepspeed
from univitar_ds.training.engine.lean.hooks import Linear


def results(function, shape, bias):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator, requires_grad=True) for size in (shape, (5, shape[-1]), (5,))]
    x, weight, added = given
    output = function.apply(x, weight, added if bias else None)
    output.backward(torch.randn(output.shape, generator=generator))
    return [output, x.grad, weight.grad, added.grad]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_a_linear_layer_computes_the_bits_of_deepspeeds(shape, bias):
    load_deepspeed()
    from deepspeed.runtime.zero import linear

    # The name may already be ours, after a test that has built an engine in this process.
    theirs = linear.LinearFunctionForZeroStage3
    if theirs is Linear:
        theirs = next(kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__ == linear.__name__)
    for ours, wanted in zip(results(Linear, shape, bias), results(theirs, shape, bias), strict=True):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.equal(ours, wanted)


def test_a_frozen_weight_gets_no_gradient():
    weight, bias = torch.ones(2, 3), torch.ones(2)
    x = torch.ones(4, 3, requires_grad=True)
    Linear.apply(x, weight, bias).sum().backward()
    assert x.grad.tolist() == [[2.0] * 3] * 4
    assert weight.grad is None
    assert bias.grad is None
