"""Muon on sharded matrices equals torch's on one process, bit for bit where gradients are equal."""

from types import MappingProxyType

import pytest
import torch

from tests.support.dense import dense_sigmoid
from tests.support.distributed import run_distributed
from tests.support.given import FAST, KINDS, MIDDLE, STEPS, Towers, assert_whole, at, rate, scale_of, trained
from tests.support.standin import LANES, StandIn, inputs, pack
from tests.support.training import ds_config, losses, lr, steps
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import EMA, MASTER
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.engine.optim import block_matrices

pytestmark = pytest.mark.distributed
CONFIG = OptimizerConfig(kind="muon", layer_decay=0.5, weight_decay=0.1, betas=(0.9, 0.98), ema_decay=0.9)


def by_torch():
    """Weights, moments and averages after STEPS steps of torch's optimizers, by name."""
    model = Towers()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    averages = {name: parameter.detach().clone() for name, parameter in named.items()}
    optimizers = {}
    for name, parameter in named.items():
        if "layers" in name and parameter.ndim == 2:
            made = torch.optim.Muon([parameter], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        else:
            decay = 0.1 if parameter.ndim == 2 else 0.0
            made = torch.optim.AdamW([parameter], betas=(0.9, 0.98), eps=1e-8, weight_decay=decay)
        optimizers[name] = made
    for step in range(STEPS):
        at(model, step)
        model(torch.zeros(())).backward()
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rate(step) * scale_of(name)
            optimizer.step()
            optimizer.zero_grad()
            averages[name].lerp_(named[name].detach(), 1 - min(0.9, (2 + step) / (11 + step)))
    found = {}
    for name, parameter in named.items():
        state = {kind: value for kind, value in optimizers[name].state[parameter].items() if kind != "step"}
        found[name] = {MASTER: parameter.detach(), **state, EMA: averages[name]}
    return found


def of_kinds(kinds, source=None, folders=MappingProxyType({})):
    """Args: source: a checkpoint from which all continue; folders: where some are saved at MIDDLE, by name."""
    world = start_world()
    return {name: trained(world, CONFIG, settings, source, folders.get(name)) for name, settings in kinds.items()}


def assert_torch(wanted, answers, kinds):
    for kind, settings in kinds.items():
        copies = len(answers) // settings.get("sharing", len(answers))
        assert_whole([answer[kind] for answer in answers], wanted, kind, copies)


@pytest.fixture(scope="module")
def wanted():
    return by_torch()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The results of two ranks, and their checkpoints at MIDDLE by name."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("bf16 zero1", "zero3")}
    answers = run_distributed(of_kinds, 2, {kind: KINDS[kind] for kind in FAST}, None, folders)
    return answers, {kind: folder / f"step-{MIDDLE:08d}" for kind, folder in folders.items()}


def test_on_two_ranks_weights_and_moments_are_those_of_torch_bit_for_bit_with_any_sharding(wanted, two):
    assert_torch(wanted, two[0], {kind: KINDS[kind] for kind in FAST})


def test_one_rank_has_the_same_results_and_continues_from_two_ranks_of_another_stage(wanted, two):
    for source, kind in ((None, "zero1"), (two[1]["zero3"], "zero2"), (two[1]["bf16 zero1"], "zero3")):
        kinds = {kind: KINDS[kind]}
        assert_torch(wanted, run_distributed(of_kinds, 1, kinds, source), kinds)


def dense(monkeypatch):
    """Losses and weights of STEPS steps of torch's optimizers on the packs of all lanes at once."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's Muon iterates in bfloat16 only
    model = StandIn()
    matrices = block_matrices(model)
    rest = [p for name, p in model.named_parameters() if p.requires_grad and name not in matrices]
    plain = [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [
        torch.optim.Muon(matrices.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1}, *plain], betas=(0.9, 0.98)
        ),
    ]
    found = []
    for step in range(STEPS):
        outputs = [model(*inputs(pack(step, lane))) for lane in range(LANES)]
        vision, text = (torch.cat([output[i] for output in outputs]) for i in (0, 1))
        loss = dense_sigmoid(vision, text, outputs[0][2], outputs[0][3])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*matrices.values(), *rest], 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.item())
    return found, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def standin(kinds):
    """Losses of STEPS steps, and this rank's parts of the weights, by kind."""
    world, answers = start_world(), {}
    cfg = OptimizerConfig(kind="muon", muon={"precision": "fp32"}, betas=(0.9, 0.98))
    for kind in kinds:
        engine = build_engine(StandIn(), cfg, ds_config(LANES // world.size, **KINDS[kind]), world)
        results = losses(steps(engine, 0, STEPS))
        parts = [(p.name, p.start, p.tensors[MASTER].clone()) for p in engine.pieces() if MASTER in p.tensors]
        answers[kind] = results, parts
        engine.close()
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_with_clipped_gradients_is_that_of_torch_to_1e_5_of_the_weights(monkeypatch, ranks):
    wanted, weights = dense(monkeypatch)
    for answer in run_distributed(standin, ranks, ["zero2", "zero3"]):
        for kind, (found, parts) in answer.items():
            assert max(abs(got - loss) / loss for got, loss in zip(found, wanted, strict=True)) < 1e-5, kind
            for name, start, values in parts:
                part = weights[name].flatten()[start : start + len(values)]
                assert ((values - part).abs() <= 1e-5 * weights[name].abs().max()).all(), f"{name} of {kind}"


@pytest.mark.slow
def test_four_ranks_as_two_by_two_and_all_together_continue_from_two(wanted, two):
    kinds = {"node": {"sharing": 2}, "zero2": {"stage": 2}, "zero3": {}}
    for source in (None, two[1]["zero3"]):
        assert_torch(wanted, run_distributed(of_kinds, 4, kinds, source), kinds)


@pytest.mark.slow
def test_other_kinds_of_zero_are_those_of_torch_too(wanted):
    kinds = {kind: settings for kind, settings in KINDS.items() if kind not in FAST}
    assert_torch(wanted, run_distributed(of_kinds, 2, kinds), kinds)
