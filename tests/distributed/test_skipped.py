"""An update that is skipped because its loss or gradient is not finite changes no state, with every kind of ZeRO."""

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.standin import LANES, StandIn, pack
from tests.support.training import OBJECTIVE, ds_config, lr
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import NotFiniteError, StepSettings, train_step

pytestmark = pytest.mark.distributed
KINDS = {
    "zero3": {},
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "offload": {"offload": True},
    "bf16 zero3": {"bf16": True},
    "bf16 zero2": {"bf16": True, "stage": 2},
    "bf16 zero1": {"bf16": True, "stage": 1},
}
FAST = ["zero3", "bf16 zero2"]


class NoNumber(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def step(engine, number, fault=None):
    """Runs a step. With a `fault` the outputs of one rank, or their gradients, are not finite. Returns the error."""
    packs = [pack(number, lane) for lane in engine.world.lanes(LANES)]
    forward = engine.module.forward
    spoil = {"loss": lambda x: x * float("nan"), "gradient": NoNumber.apply}.get(fault)
    if spoil and engine.world.rank == 1:
        engine.module.forward = lambda *inputs: (spoil((out := forward(*inputs))[0]), *out[1:])
    try:
        return train_step(engine, packs, StepSettings(lr(number), read_gradient=True), OBJECTIVE)
    except NotFiniteError as error:
        return error
    finally:
        engine.module.forward = forward


def stored(engine):
    """All weights, moments and averages of this rank, and the optimizer's number of updates."""
    tensors = {(p.name, kind): tensor.clone() for p in engine.pieces() for kind, tensor in p.tensors.items()}
    state = engine.optimizer_state()
    return tensors, state["updates"]


def equal(one, other):
    return one[1] == other[1] and all(torch.equal(tensor, other[0][place]) for place, tensor in one[0].items())


def trained(world, faults, settings):
    """Runs four good steps, and before step N the steps with the faults of N: results, errors, changes, last state."""
    config = OptimizerConfig(betas=(0.9, 0.98), ema_decay=0.9)
    engine = build_engine(StandIn(), config, ds_config(LANES // world.size, **settings), world)
    results, errors, changed = [], [], []
    for number in range(4):
        for fault in faults.get(number, ()):
            before = stored(engine)
            errors.append(step(engine, number + 10, fault))
            if not equal(before, stored(engine)):
                changed.append((number, fault))
        results.append(step(engine, number))
    last = stored(engine)
    engine.close()
    return results, [(str(error), error.items, error.suspects) for error in errors], changed, last


FAULTS = {0: ["loss"], 2: ["gradient", "loss"], 3: ["gradient"]}


def with_and_without_faults(kinds):
    world = start_world()
    answers = {}
    for kind in kinds:
        results, errors, changed, last = trained(world, FAULTS, KINDS[kind])
        plain, _, _, wanted = trained(world, {}, KINDS[kind])
        answers[kind] = results == plain, errors, changed, equal(last, wanted), last[1]
    return answers


def assert_skipped(answers):
    for rank, answer in enumerate(answers):
        for kind, (same_results, errors, changed, same_state, updates) in answer.items():
            assert not changed, f"{kind}: a skipped update changed the state in steps {changed}"
            assert same_results, f"{kind}: the steps after a skipped update differ"
            assert same_state, kind
            assert updates == 4, kind
            said = [message.split(" at ")[0] for message, *_ in errors]
            assert said == ["the loss is nan", "the gradient is not finite", *said[2:]], kind
            assert said[2:] == ["the loss is nan", "the gradient is not finite"], kind
            assert all(items > 0 for _, items, _ in errors)
            assert [bool(suspects) for *_, suspects in errors] == [rank == 1, False, rank == 1, False], kind
        assert [e[:2] for e in answer[next(iter(answer))][1]] == [e[:2] for e in answers[0][next(iter(answer))][1]]


@pytest.mark.parametrize("kinds", [FAST, pytest.param([*KINDS.keys() - FAST], marks=pytest.mark.slow)])
def test_a_loss_or_gradient_of_one_rank_that_is_not_finite_changes_nothing_on_any_rank(kinds):
    assert_skipped(run_distributed(with_and_without_faults, 2, kinds))


@pytest.mark.slow
def test_it_changes_nothing_with_one_pack_of_a_rank_and_a_single_pass_too():
    assert_skipped(run_distributed(with_and_without_faults, 4, FAST))
