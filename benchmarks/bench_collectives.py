"""Counts the collectives of a training step, and the bytes that a rank hands to them, for each file of `ds_configs/`.

    python benchmarks/bench_collectives.py [--configurations zero1 zero2 ...] [--ranks 64] [--packs 1 4]

The model has the 24 blocks and 12 text layers of the recipe univitar_0p3b, in 96 instead of 1,024 and 768 channels;
buckets and thresholds shrink with it, so that they split the parameters like those of the full model. The engine is the
trainer's (`build_engine`). Each count runs in a separate process as rank 0 of a fake world of machines with 8 ranks:
torch's fake process group returns at once and moves no data, so sizes, counts and order are real and results are not.
The first steps, in which DeepSpeed records the order of the modules, are not counted. "bytes_per_parameter": bytes of
the tensors that the rank passes to collectives in a step, divided by the parameters of the model. "held": the bytes per
parameter of weights, gradients and optimizer states that the rank holds between two steps. Rows are written to
results/bench_collectives.csv.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, git_commit, write_rows
from univitar_ds.config.deepspeed import NODE, SHARDING, read_deepspeed, resolve_deepspeed, sharing_ranks
from univitar_ds.config.load import load_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.model.build import build_contrastive
from univitar_ds.planning.sizes import Counts, memory_of_rank
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import Engine, build_engine

KINDS = ("allgather", "reduce_scatter", "allreduce")
CONFIGURATIONS = ("zero1", "zero2", "zero3", "zero3_node")
NODE_RANKS = 8
WARMUP_STEPS = 2
WIDTH = 96
NARROW = (
    f"model.encoder={{hidden_size: {WIDTH}, num_hidden_layers: 24, num_attention_heads: 4, intermediate_size: 288}}",
    f"model.embed_dim={WIDTH}",
    "model.pool_heads=4",
    f"model.text={{hidden_size: {WIDTH}, layers: 12, heads: 4, intermediate_size: 384, vocab_size: 512}}",
)
SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
"""Keys of `zero_optimization` that are numbers of elements."""
THRESHOLD = "stage3_param_persistence_threshold"


class Collectives(TorchDispatchMode):
    """Counts the collectives in its context and the bytes of their input on this rank, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.sent = 0

    def of(self, kind: str) -> int:
        """Returns the calls of operators whose names begin with `kind`."""
        return sum(calls for name, calls in self.calls.items() if name.startswith(kind))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            self.calls[name] += 1
            # The second argument of gathering and scattering operators is the input, of others the first.
            given = args[1] if name.startswith(("allgather", "reduce_scatter")) else args[0]
            self.sent += sum(t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, Tensor))
        return function(*args, **(kwargs or {}))


def fake_world(ranks: int) -> World:
    """Makes this process rank 0 of `ranks` ranks that do not exist."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return World(0, ranks, 0, torch.device("cpu"))


def build(config: RunConfig, device: str = "cpu") -> nn.Module:
    """Builds the model of a run, with the largest vocabulary that its text tower may have."""
    with torch.device(device):
        return build_contrastive(config.model, vocab_size=config.model.text.vocab_size, eos_id=1, pad_id=0, seed=0)


def fitted(zero: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Returns `zero_optimization` with bucket sizes scaled to the narrow model."""
    whole = [parameter.numel() for parameter in build(load_config("univitar_0p3b"), "meta").parameters()]
    narrow = [parameter.numel() for parameter in model.parameters()]
    shrunk = {key: max(64, zero[key] * sum(narrow) // sum(whole)) for key in SIZES if key in zero}
    if limit := zero.get(THRESHOLD):
        kept = [mine for mine, full in zip(narrow, whole, strict=True) if full <= limit]
        shrunk[THRESHOLD] = max(kept)
        assert sum(mine <= max(kept) for mine in narrow) == len(kept), "other parameters would stay whole"
    return {**zero, **shrunk}


def count(name: str, ranks: int, packs: int) -> dict[str, Any]:
    """Returns a row for one step of `packs` packs for each of `ranks` ranks."""
    world = fake_world(ranks)
    config = load_config("univitar_0p3b", [f"data.lanes={ranks * packs}", "model.checkpoint_every=0", *NARROW])
    model = build(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    content = read_deepspeed(name)
    content["zero_optimization"] = fitted(content["zero_optimization"], model)
    if content.get(SHARDING) == NODE:
        content[SHARDING] = NODE_RANKS
    resolved = resolve_deepspeed(config, ranks, content, ("the recipe", name))
    engine = build_engine(model, config.optimizer, resolved, world)
    counted = Collectives()
    for step in range(WARMUP_STEPS + 1):
        counted.clear()
        engine.zero_grad(1e-4)
        with counted:
            for _ in range(packs):
                one_pack(engine)
        assert engine.global_steps == step + 1
    sharing = sharing_ranks(resolved, ranks, NODE_RANKS)
    counts = Counts({"blocks": total})
    held = memory_of_rank(config, config.stages[0], counts, sharing, resolved).device / total
    return {
        "configuration": name,
        "ranks": ranks,
        "packs_per_rank": packs,
        "parameters": total,
        "collectives": counted.calls.total(),
        **{f"{kind}s": counted.of(kind) for kind in KINDS},
        "bytes_per_parameter": round(counted.sent / total, 3),
        "held": round(held, 3),
        "date": date.today().isoformat(),
        "commit": git_commit(),
    }


def one_pack(engine: Engine) -> None:
    """Runs forward and backward of a pack of two images and captions."""
    grids, frames = torch.tensor([[1, 2, 2]] * 2), torch.ones(2, dtype=torch.int64)
    pixels = torch.zeros(2 * 4 * 588, dtype=torch.uint8)
    vision, text, scale, bias = engine(pixels, frames, grids, torch.full((2, 8), 2), torch.full((2,), 8))[:4]
    engine.backward(((vision * text).sum() * scale + bias).sum())
    engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", default=CONFIGURATIONS)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(count(given.configurations[0], given.ranks, given.packs[0])))
        return
    rows = []
    for name in given.configurations:
        for packs in given.packs:
            command = [sys.executable, __file__, "--one", "--configurations", name]
            command += ["--ranks", str(given.ranks), "--packs", str(packs)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    write_rows(RESULTS / "bench_collectives.csv", rows)


if __name__ == "__main__":
    main()
