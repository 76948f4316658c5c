"""The dtype of features outside of training, and the copy of a model that computes them."""

import pytest
import torch
from torch import nn

from univitar_ds.model.placement import feature_dtype, placed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Scaled(nn.Module):
    exact_parameters = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([10.03]))
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        self.tied = self.linear.weight
        self.register_buffer("places", torch.arange(4))


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), None), ((8, 0), torch.bfloat16), ((10, 0), torch.bfloat16)])
def test_features_are_bfloat16_on_gpus_that_compute_in_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert feature_dtype(GPU) == dtype
    assert feature_dtype(CPU) is None


def test_a_copy_in_bfloat16_keeps_exact_values_whole_numbers_and_ties():
    model = Scaled()
    half = placed(model, CPU, torch.bfloat16)
    assert type(half) is Scaled
    assert {name: value.dtype for name, value in half.state_dict().items()} == {
        "scale": torch.float32,
        "linear.weight": torch.bfloat16,
        "linear.bias": torch.bfloat16,
        "tied": torch.bfloat16,
        "places": torch.int64,
    }
    assert torch.equal(half.scale, model.scale)
    assert half.tied is half.linear.weight
    assert [one.requires_grad for one in half.parameters()] == [True, False, False]


def test_the_model_is_not_changed():
    model = Scaled()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (None, torch.bfloat16):
        for tensor in placed(model, CPU, dtype).state_dict().values():
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in placed(model, CPU).state_dict().items())
