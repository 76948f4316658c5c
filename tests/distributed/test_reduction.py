"""The dtype in which ranks sum gradients in a bf16 run: bf16, or fp32 with `communication_data_type`."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.distributed import run_distributed
from tests.support.training import ds_config
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.training.distributed.process_group import start_world
from univitar_ds.training.engine.engine import build_engine

pytestmark = pytest.mark.distributed
WIDTH, SMALL = 16, 2**-10
KINDS = {f"zero{stage}": {"stage": stage, "bf16": True} for stage in (1, 2, 3)}


class Reductions(TorchDispatchMode):
    """Records the dtypes of tensors that are summed over ranks, except single numbers such as norms."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("c10d::").strip("_")
        if function.namespace == "c10d" and name.startswith(("allreduce", "reduce_scatter")):
            self.found |= {t.dtype for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.numel() >= WIDTH}
        return function(*args, **(kwargs or {}))


def reduced(asked):
    """By kind: dtypes of the sums, and the norm of a gradient that is 1 on rank 0 and SMALL on rank 1 for each
    weight."""
    world = start_world()
    answers = {}
    for kind, settings in KINDS.items():
        content = ds_config(1, **settings) | asked
        engine = build_engine(nn.Linear(WIDTH, WIDTH, bias=False), OptimizerConfig(), content, world)
        engine.zero_grad(1e-3)
        with Reductions() as reductions:
            output = engine(torch.eye(WIDTH, dtype=torch.bfloat16))
            engine.backward(output.float().sum() * (SMALL if world.rank else 1.0))
            engine.step()
        answers[kind] = {str(dtype) for dtype in reductions.found}, engine.grad_norm
        engine.close()
    return answers


@pytest.mark.parametrize(
    ("asked", "dtype", "total"),
    [({}, torch.bfloat16, 1.0), ({"communication_data_type": "fp32"}, torch.float32, 1.0 + SMALL)],
)
def test_ranks_sum_gradients_in_bf16_unless_the_json_asks_for_fp32(asked, dtype, total):
    for answer in run_distributed(reduced, 2, asked):
        for kind, (types, norm) in answer.items():
            assert types == {str(dtype)}, kind
            assert abs(norm - WIDTH * total) < WIDTH * SMALL / 100, kind
