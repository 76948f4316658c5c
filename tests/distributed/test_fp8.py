"""Training with matrix products in 8-bit floating point, emulated on a CPU."""

import pytest
import torch
from torch import nn

from tests.support.distributed import run_distributed
from tests.support.standin import LANES, WithEncoder
from tests.support.training import ds_config, losses, steps
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.errors import ConfigError, InstallationError
from univitar_ds.training import fp8
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine

pytestmark = pytest.mark.distributed
STEPS, FEW = 50, 10
KINDS = {
    "plain": ({"bf16": True}, 0),
    "zero1": ({"stage": 1, "bf16": True}, 0),
    "zero2": ({"stage": 2, "bf16": True}, 0),
    "zero3": ({"bf16": True}, 0),
    "recomputed": ({"bf16": True}, 1),
    "selective": ({"bf16": True}, "selective"),
}


def trained():
    """Losses, and names of the weights, by kind."""
    world, answers = start_world(), {}
    for kind, (settings, recomputed) in KINDS.items():
        model = WithEncoder(checkpoint_every=recomputed, hidden=32)
        if kind != "plain":
            fp8.use_fp8(model)
        engine = build_engine(model, OptimizerConfig(), ds_config(LANES // world.size, **settings), world)
        names = [piece.name for piece in engine.pieces()]
        answers[kind] = losses(steps(engine, 0, STEPS if kind in ("plain", "zero3") else FEW)), names
        engine.close()
    return answers


@pytest.mark.slow
def test_fifty_steps_learn_as_much_as_without_fp8_and_the_losses_are_equal_for_every_kind_of_zero():
    pytest.importorskip("torchao", reason="needs the extra fp8: pip install 'univitar_ds[fp8]'")
    for answer in run_distributed(trained, 2):
        plain, names = answer.pop("plain")
        wanted = answer["zero3"][0]
        # Without gradients the loss would stay at that of the first steps.
        learned, as_plain = (sum(found[:5]) - sum(found[-5:]) for found in (wanted, plain))
        assert learned > 0.8 * as_plain > 0
        for kind, (found, same_names) in answer.items():
            assert same_names == names, "weights keep their names"
            assert found[0] != plain[0], f"{kind} rounds to 8 bits"
            exact = kind in ("recomputed", "selective")
            bounds = [0.0 if exact else 0.05 * loss for loss in wanted]
            assert all(abs(one - other) <= most for one, other, most in zip(found, wanted, bounds, strict=False)), kind


def test_missing_requirements_are_reported_before_a_run_starts(monkeypatch):
    monkeypatch.setattr(fp8, "find_spec", lambda name: None)
    with pytest.raises(InstallationError, match=r"needs the package torchao.*univitar_ds\[fp8\]"):
        fp8.use_fp8(nn.Linear(16, 16))
    monkeypatch.setattr(fp8, "find_spec", lambda name: name)
    monkeypatch.setattr(fp8, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(
        ConfigError, match=r"NVIDIA A100 has compute capability 8.0; .* need 8.9 .*; set model.fp8=false"
    ):
        fp8.check_fp8()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    fp8.check_fp8()


def test_a_model_without_fitting_layers_is_refused():
    pytest.importorskip("torchao", reason="needs the extra fp8: pip install 'univitar_ds[fp8]'")
    with pytest.raises(ConfigError, match="no linear layer of a block has sizes that are multiples of 16"):
        fp8.use_fp8(WithEncoder())
