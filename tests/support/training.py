"""Training of a stand-in model with the real engine, on the ranks of a test."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.support.standin import LANES, StandIn, pack
from univitar_ds.config.deepspeed import SHARDING
from univitar_ds.config.model import ObjectiveConfig
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.formats.elastic import read_full
from univitar_ds.training.checkpoint.sharded import save_checkpoint
from univitar_ds.training.distributed.process_group import World, gather_numbers
from univitar_ds.training.engine.engine import Engine, build_engine
from univitar_ds.training.step.train_step import StepResult, StepSettings, train_step

OBJECTIVE = ObjectiveConfig(chunk=5)


def lr(step: int) -> float:
    return 2e-3 * min(1, (step + 1) / 5) * (0.5 + 0.5 * math.cos(math.pi * step / 40))


def ds_config(
    gas: int,
    *,
    stage: int = 3,
    bf16: bool = False,
    offload: bool = False,
    kept_whole: int = 50,
    sharing: int | None = None,
) -> dict[str, Any]:
    """A DeepSpeed config with small buckets, whose borders are inside parameters. Parameters of up to `kept_whole`
    elements are not partitioned.

    Groups of `sharing` ranks share a training state; None: all ranks.
    """
    zero = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": 3000,
        "stage3_param_persistence_threshold": kept_whole,
        "stage3_prefetch_bucket_size": 2000,
        **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
        **({"parameter_alignment": True} if stage == 2 else {}),
    }
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        **({} if sharing is None else {SHARDING: sharing}),
        **precision,
    }


def engine_of(world: World, model: StandIn | None = None, *, betas=(0.9, 0.98), **settings: Any) -> Engine:
    model = StandIn() if model is None else model
    return build_engine(model, OptimizerConfig(betas=betas), ds_config(LANES // world.size, **settings), world)


def steps(engine: Engine, first: int, last: int, **options: Any) -> list[StepResult]:
    lanes = engine.world.lanes(LANES)
    return [
        train_step(engine, [pack(s, lane) for lane in lanes], StepSettings(lr(s), **options), OBJECTIVE)
        for s in range(first, last)
    ]


def norm_of_parts(engine: Engine) -> float:
    """The norm of the last gradient, from the parts of all ranks."""
    return math.sqrt(gather_numbers(list(engine.gradient_squares.values()), engine.world).sum().item())


def losses(results: list[StepResult]) -> list[float]:
    return [result.loss for result in results]


def weights(engine: Engine, folder) -> dict[str, torch.Tensor]:
    """All weights by name, saved to and read from a checkpoint in `folder`."""
    return read_full(save_checkpoint(engine, folder, 1, {}, {}, keep=1))
