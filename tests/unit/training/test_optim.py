import torch
from torch import nn

from tests.support.standin import StandIn
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.optim import build_optimizer, parameter_groups


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = StandIn()
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, 0.2))
    assert "blocks.0.qkv.weight" in decaying
    assert "embedding.weight" in decaying
    assert {"logit_scale", "logit_bias", "blocks.0.norm1.weight", "inlet.bias"} <= set(plain)
    assert not any(name.startswith("fixed") for name in decaying + plain)
    assert len(decaying) + len(plain) == sum(p.requires_grad for p in model.parameters())
    assert [group["weight_decay"] for group in parameter_groups(model, 0.2)] == [0.2, 0.0]


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_the_optimizer_follows_its_section_of_the_run_file():
    settings = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(StandIn(), settings)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)
