"""The optimizer of a plugin has the same results with every kind of ZeRO, and its moments in elastic checkpoints."""

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.given import KINDS, MIDDLE, STEPS, Towers, assert_whole, at, rate, scale_of, train, trained
from tests.support.training import ds_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.elastic import MASTER
from univitar_ds.plugins import load_plugins, optimizer_of
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine

pytestmark = pytest.mark.distributed
PLUGIN = """
from univitar_ds.plugins import Moment, register_optimizer

@register_optimizer("odd")
class Odd:
    moments = {"mean": Moment(), "seen": Moment("bfloat16", 0.5)}

    def __init__(self, beta):
        self.beta = beta

    def step(self, weights, gradient, moments, *, lr, weight_decay, step):
        moments["mean"].lerp_(gradient, 1 - self.beta)
        moments["seen"].add_(0.25)
        change = moments["mean"] * moments["seen"].float() / step
        weights.mul_(1 - lr * weight_decay).sub_(change, alpha=lr)
"""
CONFIG = OptimizerConfig(kind="odd", options={"beta": 0.75}, layer_decay=0.5, weight_decay=0.1)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "odd.py"
    path.write_text(PLUGIN)
    return path


def whole(plugin):
    """Weights and moments after STEPS steps with whole parameters on one process."""
    load_plugins([str(plugin)])
    _, rule = optimizer_of(CONFIG.kind, CONFIG.options)
    load_plugins(())
    model = Towers()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {
        name: {"mean": torch.zeros(p.shape), "seen": torch.full(p.shape, 0.5, dtype=torch.bfloat16)}
        for name, p in named.items()
    }
    for step in range(STEPS):
        at(model, step)
        model(torch.zeros(())).backward()
        for name, parameter in named.items():
            options = {"lr": rate(step) * scale_of(name), "weight_decay": 0.1 if parameter.ndim > 1 else 0.0}
            rule.step(parameter.data, parameter.grad, state[name], **options, step=step + 1)
            parameter.grad = None
    return {name: {MASTER: parameter.detach(), **state[name]} for name, parameter in named.items()}


def of_kinds(plugin, kinds, source=None, save_to=None):
    load_plugins([str(plugin)])
    world = start_world()
    return {name: trained(world, CONFIG, settings, source, save_to) for name, settings in kinds.items()}


def refused(plugin, source):
    load_plugins([str(plugin)])
    try:
        trained(start_world(), CONFIG, {"stage": 1}, source)
    except CheckpointError as error:
        return str(error)
    return ""


def unfrozen(plugin, folder):
    """(minimum, maximum) by kind of the moments of the head, loaded from a checkpoint in which the head is frozen."""
    load_plugins([str(plugin)])
    world, content = start_world(), ds_config(1) | {"gradient_clipping": 0.0}
    model = Towers()
    model.head.requires_grad_(False)
    engine = build_engine(model, CONFIG, content, world)
    train(engine, 0, 2)
    saved = save_checkpoint(engine, folder, 2, {}, {}, keep=1)
    engine.close()
    engine = build_engine(Towers(), CONFIG, content, world, {"rest": 2})
    train(engine, 0, 1)  # so that the engine has moments already, as before a rollback
    load_checkpoint(engine, saved, stage_transition=True)
    (head,) = [piece.tensors for piece in engine.pieces() if piece.name == "head.weight"]
    found = {kind: (head[kind].min().item(), head[kind].max().item()) for kind in ("mean", "seen")}
    engine.close()
    return found


def test_weights_that_are_unfrozen_start_with_the_declared_values(plugin, tmp_path):
    (found,) = run_distributed(unfrozen, 1, plugin, tmp_path)
    assert found == {"mean": (0.0, 0.0), "seen": (0.5, 0.5)}


def test_it_updates_shards_as_whole_parameters_and_its_moments_move_between_stages_and_ranks(plugin, tmp_path):
    wanted = whole(plugin)
    for ranks, kind, source in ((2, "zero3", None), (1, "zero2", tmp_path / f"step-{MIDDLE:08d}")):
        kinds = {kind: KINDS[kind]}
        answers = run_distributed(of_kinds, ranks, plugin, kinds, source, None if source else tmp_path)
        assert_whole([answer[kind] for answer in answers], wanted, kind)

    other = tmp_path / "odd.py"
    other.write_text(PLUGIN.replace('"seen"', '"count"'))
    (said,) = run_distributed(refused, 1, other, tmp_path / f"step-{MIDDLE:08d}")
    assert "other moments of the optimizer than this run: mean, seen of " in said
    assert ", not count, mean; resume with the version of the plugin that wrote it" in said


@pytest.mark.slow
def test_every_kind_of_zero_has_the_same_results(plugin):
    wanted, answers = whole(plugin), run_distributed(of_kinds, 2, plugin, KINDS)
    for kind in KINDS:
        assert_whole([answer[kind] for answer in answers], wanted, kind)
