"""The scale and bias of the logits under ZeRO with a bf16 model: their float32 values are used, and trained."""

import math

import pytest
import torch

from tests.support.contrastive import captioned_pack, small_model
from tests.support.distributed import run_distributed
from tests.support.standin import LANES
from tests.support.training import OBJECTIVE, ds_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import read_full
from univitar_ds.training.checkpoint.sharded import load_checkpoint, save_checkpoint
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine
from univitar_ds.training.step.train_step import StepSettings, train_step

pytestmark = pytest.mark.distributed
BIAS, SCALE = -10.03, 10.1
"""bfloat16 cannot represent these numbers, nor the logarithm of the scale."""
STAGES = (1, 2, 3)


def run(folder):
    """Returns, by ZeRO stage, the (scale, bias) that each of three steps reports, and both weights as saved before each
    step. The third step runs in a new engine that loads the last checkpoint."""
    world = start_world()
    answers = {}
    for stage in STAGES:
        cfg = ds_config(LANES // world.size, stage=stage, bf16=True)
        reported, saved = [], []
        for steps in ((0, 1), (2,)):
            engine = build_engine(
                small_model(logit_bias_init=BIAS, logit_scale_init=SCALE), OptimizerConfig(), cfg, world
            )
            if saved:
                load_checkpoint(engine, last)  # noqa: F821
            for step in steps:
                if step < 2:
                    saved.append(
                        read_full(save_checkpoint(engine, folder / f"{stage}-{step}", step + 1, {}, {}, keep=1))
                    )
                packs = [captioned_pack(lane, step) for lane in world.lanes(LANES)]
                result = train_step(engine, packs, StepSettings(1e-2), OBJECTIVE)
                reported.append((result.logit_scale, result.logit_bias))
            last = save_checkpoint(engine, folder / f"{stage}-last", 9, {}, {}, keep=1)
            if steps == (0, 1):
                saved.append(read_full(last))
            engine.close()
        answers[stage] = reported, [{name: one[name] for name in ("logit_scale", "logit_bias")} for one in saved]
    return answers


def test_scale_and_bias_are_used_in_float32(tmp_path):
    ranks = run_distributed(run, 2, tmp_path)
    assert ranks[0].keys() == set(STAGES)
    for rank in ranks:
        for stage, (reported, saved) in rank.items():
            for (scale, bias), weights in zip(reported, saved, strict=True):
                assert weights["logit_bias"].shape == weights["logit_scale"].shape == (1,)
                assert weights["logit_bias"].dtype == torch.float32
                assert bias == weights["logit_bias"].item(), f"ZeRO {stage}"
                assert scale == weights["logit_scale"].exp().item(), f"ZeRO {stage}"
            assert saved[0]["logit_bias"].item() == torch.tensor(BIAS).item()
            assert saved[0]["logit_scale"].item() == torch.tensor(math.log(SCALE)).item()
            assert len({bias for _, bias in reported}) == 3, "the bias is not trained"
            assert len({scale for scale, _ in reported}) == 3, "the scale is not trained"
