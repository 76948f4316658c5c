"""An optimizer whose update is not elementwise is refused before a run starts."""

import pytest
import torch

from univitar_ds.errors import PluginError
from univitar_ds.plugins import Moment
from univitar_ds.training.optimizers.elementwise import check_elementwise, new_moment


class Momentum:
    """Stochastic gradient descent with momentum, and one of the faults."""

    def __init__(self, fault=None):
        self.fault = fault
        self.moments = {"mean": Moment()}

    def step(self, weights, gradient, moments, *, lr, weight_decay, step):
        if self.fault == "norm":
            gradient = gradient / gradient.norm()
        if self.fault == "replaces":
            moments["mean"] = moments["mean"] * 0.9
        if self.fault == "infinite":
            gradient = gradient / 0.0
        mean = moments["mean"].mul_(0.9).add_(gradient)
        if self.fault == "moment":
            mean.add_(mean.mean())
        weights.mul_(1 - lr * weight_decay).sub_(lr * mean)


def test_momentum_is_elementwise():
    check_elementwise(Momentum())


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("norm", "weights of 60 elements differ if they are updated in three parts; each element must be updated"),
        ("moment", "of 60 elements differ if they are updated in three parts"),
        ("replaces", "step replaces a moment in the dict; write into the tensor"),
        ("infinite", "two updates of 60 random weights with gradients near 1 are not finite"),
    ],
)
def test_an_error_is_reported_with_its_remedy(fault, said):
    with pytest.raises(PluginError, match=said):
        check_elementwise(Momentum(fault))


def test_a_moment_has_the_declared_type_and_value():
    moment = new_moment(Moment("bfloat16", 0.5), torch.zeros(3))
    assert moment.dtype == torch.bfloat16
    assert moment.tolist() == [0.5] * 3
