import pytest
import torch
from torch import nn

from tests.support.standin import StandIn
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.engine.optim import (
    GRADIENT_PARTS,
    block_matrices,
    build_optimizer,
    counted_updates,
    matrix_scales,
    parameter_groups,
    part_of,
    put_unaligned_last,
    set_learning_rate,
    settings,
)

DECAY = OptimizerConfig(weight_decay=0.2)


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = StandIn()
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, plain = ([names[id(p)] for p in group["params"]] for group in parameter_groups(model, DECAY))
    assert "blocks.0.qkv.weight" in decaying
    assert "embedding.weight" in decaying
    assert {"logit_scale", "logit_bias", "blocks.0.norm1.weight", "inlet.bias"} <= set(plain)
    assert not any(name.startswith("fixed") for name in decaying + plain)
    assert len(decaying) + len(plain) == sum(p.requires_grad for p in model.parameters())
    assert [group["weight_decay"] for group in parameter_groups(model, DECAY)] == [0.2, 0.0]


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), DECAY)) == 1


def test_the_optimizer_follows_its_section_of_the_run_file():
    section = OptimizerConfig(betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(StandIn(), section)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 for g in optimizer.param_groups)


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu"), (None, "cpu")])
def test_the_count_of_updates_is_on_the_device_where_adam_reads_it(fused, device):
    """Fused kernels read it on the device of the weights, whatever that is."""
    done = counted_updates(3.0, torch.empty(2, device="meta"), {"fused": fused})
    assert (done.device.type, done.dtype, done.shape) == (device, torch.float32, ())


def test_settings_are_what_decides_the_result_and_not_how_a_machine_computes():
    (group, _) = build_optimizer(StandIn(), DECAY).param_groups
    kept = settings(group)
    assert kept.keys() >= {"lr", "betas", "eps", "weight_decay", "lr_scale", "began", "amsgrad", "maximize"}
    assert not kept.keys() & {"params", "fused", "foreach", "capturable"}


def test_the_gradient_is_reported_by_the_parts_that_freeze_and_the_rest_in_two():
    names = {
        "vision.embeddings.patch_embedding.weight": "patch_embedding",
        "vision.encoder.layers.0.ls1": "blocks",
        "text.model.embeddings.weight": "text",
        "text_proj.weight": "heads",
        "pool.query": "heads",
        "logit_scale": "logits",
        "logit_bias": "logits",
    }
    assert {name: part_of(name, GRADIENT_PARTS) for name in names} == names
    for name, part in names.items():
        assert part_of(name) == {"heads": "rest", "logits": "rest"}.get(part, part)


class Towers(nn.Module):
    """An encoder of three blocks by its own names, and what stands around it."""

    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.vision = nn.ModuleDict({"embeddings": nn.Linear(2, 2), "encoder": nn.ModuleDict({"layers": layers})})
        self.text = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})})
        self.logit_scale = nn.Parameter(torch.zeros(1))


def test_only_layers_of_the_encoder_have_learning_rates_that_decrease_with_depth():
    model = Towers()
    groups = parameter_groups(model, OptimizerConfig(layer_decay=0.5))
    set_learning_rate(groups, 8.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if not name.endswith("bias")}
    assert found == {
        "vision.embeddings.weight": 0.5,
        "vision.encoder.layers.0.weight": 1.0,
        "vision.encoder.layers.1.weight": 2.0,
        "vision.encoder.layers.2.weight": 4.0,
        "text.encoder.layers.0.weight": 8.0,
        "logit_scale": 8.0,
    }
    assert len(groups) == 2 * 5
    assert {group["weight_decay"] for group in groups if group["lr"] == 1.0} == {0.1, 0.0}


def test_muon_has_the_trained_matrices_of_blocks_in_one_group_and_adamw_the_rest():
    model = Towers()
    block = model.vision["encoder"]["layers"][0]
    block.position = nn.Embedding(3, 2)
    block.scale = nn.Parameter(torch.ones(2))
    model.vision["encoder"]["layers"][1].weight.requires_grad_(False)
    names = ["vision.encoder.layers.0.weight", "vision.encoder.layers.2.weight", "text.encoder.layers.0.weight"]
    assert sorted(block_matrices(model)) == sorted(names)
    cfg = OptimizerConfig(kind="muon", layer_decay=0.5, muon={"lr_scale": 3.0})
    assert matrix_scales(model, cfg) == dict(zip(names, (3 / 8, 3 / 2, 3.0), strict=True))
    groups = parameter_groups(model, cfg)
    (whole,) = [group for group in groups if group.get("kind") == "muon"]
    assert {id(p) for p in whole["params"]} == {id(p) for p in block_matrices(model).values()}
    assert (whole["lr_scale"], whole["weight_decay"]) == (1.0, 0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_numbers_end_a_group_and_the_rest_keeps_its_order():
    sizes = [1, 8, 3, 16, 24]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(size)) for size in sizes])
    put_unaligned_last(optimizer)
    assert [parameter.numel() for parameter in optimizer.param_groups[0]["params"]] == [8, 16, 24, 1, 3]
