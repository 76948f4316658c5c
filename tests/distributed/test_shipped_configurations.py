"""Every file of `ds_configs/` trains on four CPU ranks, and equals plain torch up to the rounding of its precision."""

import os

import pytest
import torch

from benchmarks import bench_host
from tests.support.closeness import assert_sums_close
from tests.support.dense import dense_training
from tests.support.disk import needs_disk
from tests.support.distributed import run_distributed
from tests.support.standin import HALF_NUMBER_TERMS, LANES, STANDIN_TERMS, StandIn
from tests.support.training import losses, lr, steps
from univitar_ds.config.deepspeed import deepspeed_path, read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import check_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine import node_sharding
from univitar_ds.training.engine.engine import build_engine

pytestmark = pytest.mark.distributed
STEPS = 3
ON_DISK = "zero3_nvme"
SHIPPED = sorted({file.stem for file in deepspeed_path("zero3_cpu").parent.glob("*.json")} - {ON_DISK})


def resolved(name):
    stage = {"name": "s", "samples": 10, "lr": 1e-3}
    data = {"sources": [{"path": "x"}], "lanes": LANES}
    content = read_deepspeed(name)
    for section in content["zero_optimization"].values():
        if isinstance(section, dict):
            section.pop("pin_memory", None)  # pinned memory needs a GPU
    return resolve_deepspeed(
        check_config({"name": "r", "data": data, "stages": [stage]}, "run.yaml"), 4, content, ("run.yaml", name)
    )


def every_file(names, folder):
    """The losses with each of the files. The four ranks have the names of two machines."""
    world, answers = start_world(), {}
    os.environ["UNIVITAR_DS_NVME"] = folder
    node_sharding.os.uname = lambda: type("uname", (), {"nodename": f"node{world.rank // 2}"})
    for name in names:
        engine = build_engine(StandIn(), OptimizerConfig(betas=(0.9, 0.98)), resolved(name), world)
        answers[name] = losses(steps(engine, 0, STEPS)), str(engine.dtype)
        engine.close()
    return answers


@pytest.mark.numeric
@pytest.mark.parametrize(
    "names", [SHIPPED, pytest.param([ON_DISK], marks=needs_disk)], ids=lambda names: "-".join(names)
)
def test_each_trains_as_plain_torch(names, tmp_path):
    assert {"zero1", "zero2", "zero3", "zero3_node", "zero3_offload"} <= set(SHIPPED)
    curve = dense_training(StandIn(), STEPS, lr=lr, clip=1.0).curve
    wanted = [loss for loss, _ in curve]
    for rank, answers in enumerate(run_distributed(every_file, 4, names, str(tmp_path))):
        for name, (found, dtype) in answers.items():
            if name == "zero3_cpu":
                for step, pair in enumerate(zip(found, wanted, strict=True), 1):
                    assert_sums_close(*pair, step * STANDIN_TERMS, f"{name}, rank {rank}, step {step}")
            else:
                assert dtype == "torch.bfloat16", name
                assert_sums_close(found, wanted, HALF_NUMBER_TERMS, f"{name}, rank {rank}", dtype=torch.bfloat16)


def misplaced(name):
    """(misaligned parameters, all parameters) with a size that is a multiple of 16 bytes. Misaligned: at another
    address."""
    world, shape = bench_host.fake_world(8), bench_host.Shape(1, 1)
    model = bench_host.build(shape)
    engine = build_engine(model, OptimizerConfig(), bench_host.configuration(name, shape, model), world)
    named = list(engine.module.named_parameters())
    return [key for key, p in named if p.numel() % 8 == 0 and p.data_ptr() % 16], len(named)


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_kernels_find_every_parameter_at_a_multiple_of_16_bytes(name):
    found, parameters = run_distributed(misplaced, 1, name)[0]
    assert not found
    assert parameters > 40
