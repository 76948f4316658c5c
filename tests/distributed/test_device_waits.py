"""The places where a training step would wait for a GPU, counted on two CPU ranks, and the averaged weights."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from tests.support.contrastive import captioned_pack, small_model
from tests.support.device_waits import Waits, counted, prepared
from tests.support.distributed import run_distributed
from tests.support.standin import LANES, StandIn, pack
from tests.support.training import OBJECTIVE, ds_config, lr
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import EMA
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import StepSettings, train_step

pytestmark = pytest.mark.distributed
STAGES = [(1, True), (2, True), (3, False)]
LIMIT = 3
"""Maximum number of waits in a step: for the numbers of items, for the loss, and for the norm with the metrics."""


def waits_of_steps() -> dict[tuple[int, bool], Counter]:
    """By stage and precision, the waits of the third step, which reads the gradient and drops tokens and branches.

    ZeRO-3 compares its ranks in the first two steps. Each layer has its own learning rate and the weights are averaged,
    so that Adam has many counts of updates.
    """
    world = start_world()
    answers = {}
    for stage, bf16 in STAGES:
        cfg = ds_config(LANES // world.size, stage=stage, bf16=bf16)
        cfg["zero_optimization"]["overlap_comm"] = True
        waits = Waits()
        with prepared(waits):
            engine = build_engine(small_model(), OptimizerConfig(ema_decay=0.9, layer_decay=0.8), cfg, world)
            for step in range(3):
                packs = [captioned_pack(lane, step) for lane in world.lanes(LANES)]
                dropping = DropConfig(patches=0.5, depth=0.4, blocks=1, seed=1, step=step)
                settings = StepSettings(lr(step), read_gradient=True, dropping=dropping)
                waits.places.clear()
                with counted(waits) if step == 2 else nullcontext():
                    train_step(engine, packs, settings, OBJECTIVE)
            answers[stage, bf16] = Counter(waits.places)
            engine.close()
    return answers


def test_a_step_waits_three_times_for_the_device():
    for stage, places in run_distributed(waits_of_steps, 2)[0].items():
        assert 0 < places.total() <= LIMIT, f"under ZeRO {stage} a step waits at {dict(places)}"


def averages_of_a_run(stage: int) -> tuple[list, list]:
    """The averages of the weights after four steps, and those of a loop over single tensors, on this rank."""
    world = start_world()
    cfg = OptimizerConfig(betas=(0.9, 0.98), ema_decay=0.25)
    engine = build_engine(StandIn(), cfg, ds_config(LANES // world.size, stage=stage), world)
    wanted = [piece.tensors[EMA].clone() for piece in engine.pieces() if EMA in piece.tensors]
    for step in range(4):
        packs = [pack(step, lane) for lane in world.lanes(LANES)]
        train_step(engine, packs, StepSettings(lr(step)), OBJECTIVE)
        weight = 1 - min(0.25, (2 + step) / (11 + step))
        masters = [piece.tensors["fp32"] for piece in engine.pieces() if EMA in piece.tensors]
        for average, master in zip(wanted, masters, strict=True):
            average.lerp_(master, weight)
    kept = [piece.tensors[EMA].clone() for piece in engine.pieces() if EMA in piece.tensors]
    engine.close()
    return kept, wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_the_average_is_that_of_single_tensors_bit_for_bit(stage):
    for kept, wanted in run_distributed(averages_of_a_run, 2, stage):
        assert kept
        assert all(map(torch.equal, kept, wanted))
