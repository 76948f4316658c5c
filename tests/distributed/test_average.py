"""The average of the weights with ZeRO equals that of a plain loop over whole weights, and is kept in checkpoints."""

import pytest
import torch

from tests.support.closeness import assert_all_close
from tests.support.dense import dense_training
from tests.support.distributed import run_distributed
from tests.support.standin import LANES, STANDIN_TERMS, StandIn, pack
from tests.support.training import OBJECTIVE, ds_config, lr, weights
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import read_full
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import StepSettings, train_step

pytestmark = pytest.mark.distributed
DECAY, STEPS, MIDDLE = 0.6, 6, 3
SETTINGS = {
    "zero3": {},
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "offload": {"offload": True},
    "bf16 zero3": {"bf16": True},
    "bf16 zero1": {"bf16": True, "stage": 1},
}


def averaging_engine(world, **settings):
    cfg = OptimizerConfig(betas=(0.9, 0.98), ema_decay=DECAY)
    return build_engine(StandIn(), cfg, ds_config(LANES // world.size, **settings), world)


def train(engine, first, last):
    """Returns the whole weights before the first step and after each step."""
    for step in range(first, last):
        packs = [pack(step, lane) for lane in engine.world.lanes(LANES)]
        train_step(engine, packs, StepSettings(lr(step)), OBJECTIVE)


def followed(folder, settings):
    """By name of a case: whole weights before and after every step, and the average in the engine."""
    world = start_world()
    answers = {}
    for name, setting in settings.items():
        engine = averaging_engine(world, **setting)
        curve = [weights(engine, folder / name)]
        for step in range(STEPS):
            train(engine, step, step + 1)
            curve.append(weights(engine, folder / name))
        last = save_checkpoint(engine, folder / f"{name}-last", STEPS, {}, {}, keep=1)
        answers[name] = curve, read_full(last, averaged=True)
        engine.close()
    return answers


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_distributed(followed, 2, tmp_path_factory.mktemp("two"), SETTINGS)[0]


@pytest.mark.numeric
@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_the_average_of_the_whole_weights(two_ranks, name):
    curve, kept = two_ranks[name]
    average = {key: value.double() for key, value in curve[0].items()}
    for done, whole in enumerate(curve[1:], 1):
        weight = 1 - min(DECAY, (1 + done) / (10 + done))
        average = {key: value.lerp(whole[key].double(), weight) for key, value in average.items()}
    assert_all_close(kept, average, STEPS)
    moved = "vision_proj.weight"
    assert not torch.equal(kept[moved], curve[-1][moved])
    assert torch.equal(kept["fixed.weight"], curve[0]["fixed.weight"]), "the average of a frozen weight is the weight"


def halves(folder):
    """An uninterrupted training, and one from the checkpoint in the middle."""
    world = start_world()
    engine = averaging_engine(world)
    train(engine, 0, MIDDLE)
    middle = save_checkpoint(engine, folder / "a", MIDDLE, {}, {}, keep=2)
    train(engine, MIDDLE, STEPS)
    straight = read_full(save_checkpoint(engine, folder / "a", STEPS, {}, {}, keep=2), averaged=True)
    engine.close()
    return straight, resumed(world, middle, folder / "b")


def resumed(world, middle, folder, **settings):
    engine = averaging_engine(world, **settings)
    load_checkpoint(engine, middle)
    train(engine, MIDDLE, STEPS)
    whole = read_full(save_checkpoint(engine, folder, STEPS, {}, {}, keep=1), averaged=True)
    engine.close()
    return whole


def on_one_rank(folder):
    world = start_world()
    return resumed(world, folder / "a" / f"step-{MIDDLE:08d}", folder / "c", stage=2)


@pytest.mark.numeric
def test_it_continues_bit_for_bit_from_a_checkpoint_and_up_to_rounding_on_other_ranks_and_stages(tmp_path):
    straight, again = run_distributed(halves, 2, tmp_path)[0]
    assert all(torch.equal(again[name], value) for name, value in straight.items())
    alone = run_distributed(on_one_rank, 1, tmp_path)[0]
    dense = dense_training(StandIn(), STEPS, lr=lr, clip=1.0)
    assert_all_close(alone, straight, STEPS * STANDIN_TERMS, reach=dense.reach)
