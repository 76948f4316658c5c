"""Prints the bytes of a step's collectives with ZeRO-1, 2 and 3 as JSON, on rank 0 of a fake process group.

    python -m tests.support.fake_world RANKS PACKS

The other ranks do not exist: torch's fake process group returns at once and moves no data, so only sizes and counts
have a meaning. Each pack runs forward and backward; no weights stay gathered between passes.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("allgather", "reduce_scatter", "allreduce")
WIDTH, LAYERS = 256, 8
"""Of the model. It has no biases, so that 4 or 16 ranks have equal shares without padding."""


class _Sizes(TorchDispatchMode):
    """Counts the bytes that this rank has after gathering, or before reducing, by kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            sizes = [one.numel() * one.element_size() for one in tensors]
            name = function._schema.name.removeprefix("c10d::").strip("_")
            # All-gather has the whole as its output and a share as its input, reduce-scatter the reverse.
            self.found[next((kind for kind in KINDS if kind in name), name)] += max(sizes, default=0)
            self.found["calls"] += 1
        return function(*args, **(kwargs or {}))


def bytes_of_step(zero: int, ranks: int, packs: int) -> dict[str, int]:
    """Returns the bytes by kind of collective of the second step; the first records the order of the modules."""
    from univitar_ds.config.schema import OptimizerConfig
    from univitar_ds.training.distributed.process_group import World
    from univitar_ds.training.engine.engine import build_engine

    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])
    section = {"stage": zero, "overlap_comm": False, "contiguous_gradients": True}
    if zero == 3:
        section |= {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
        section |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    config = {
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": section,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": packs,
        "steps_per_print": 10**9,
    }
    engine = build_engine(model, OptimizerConfig(), config, World(0, ranks, 0, torch.device("cpu")))
    for _ in range(2):
        with _Sizes() as sizes:
            engine.zero_grad(1e-3)
            for _ in range(packs):
                engine.backward(engine(torch.ones(4, WIDTH, dtype=torch.bfloat16)).sum())
                engine.step()
    return dict(sizes.found)


def main(ranks: int, packs: int) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    sys.stdout.write(json.dumps({zero: bytes_of_step(zero, ranks, packs) for zero in (1, 2, 3)}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the fake group cannot be destroyed while DeepSpeed holds it


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
