"""Measures the host time and counts the collectives of a training step by ZeRO stage and number of ranks.

    python benchmarks/bench_host.py [--ranks 1 8 64 256 1024] [--configurations zero2 zero3 zero3_node] [--steps 7]

Each measurement runs in a separate process as rank 0 of a fake world: torch's fake process group returns at once and
moves no data, so the time of a step is that of the host alone. The model has the 24 blocks of the 0.3B encoder and the
12 layers of its text tower, in `WIDTH` instead of 1,024 channels; buckets and thresholds of `ds_configs/` shrink with
it, so that they split the parameters as those of the whole model. The engine is the trainer's (`build_engine`), bf16,
without recomputation, with one pack per step. Times are CPU seconds of the process with one thread, the median over the
steps. `plain_ms` is forward and backward of the same model without DeepSpeed in the same process, in turns with the
engine's steps, so that other load affects both: `ratio` can be compared between machines, milliseconds cannot.
Collectives are counted below DeepSpeed, in torch's dispatcher, by kind. Rows are added to results/bench_host.csv.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.rows import RESULTS, add_rows, git_commit, processor
from univitar_ds.config.deepspeed import NODE, SHARDING, read_deepspeed
from univitar_ds.config.model import ModelConfig, TextConfig
from univitar_ds.config.schema import OptimizerConfig
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import PRESETS
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import Engine, build_engine

CONFIGURATIONS = ("zero2", "zero3", "zero3_node")
NODE_RANKS = 8
WIDTH, HEADS, VOCABULARY = 64, 4, 512
WHOLE = PRESETS["0.3b"]
WHOLE_TEXT = TextConfig(
    hidden_size=768, layers=12, heads=12, intermediate_size=3072, context_length=64, vocab_size=32768
)
"""The text tower of the recipe univitar_0p3b."""
LINEAR = F.linear
WARM_UP = 4
"""Steps before those that are measured. DeepSpeed records the order of the modules in the first two."""
SIZES = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
"""Keys of `zero_optimization` that are numbers of elements and shrink with the model."""
THRESHOLD = "stage3_param_persistence_threshold"
KINDS = {"allgather": "all_gathers", "reduce_scatter": "reduce_scatters", "allreduce": "all_reduces"}
"""Column by the beginning of an operator's name; all others are `other_collectives`."""


@dataclass(frozen=True)
class Shape:
    """Depth of the encoder and of the text tower."""

    blocks: int = WHOLE.num_hidden_layers
    text_layers: int = WHOLE_TEXT.layers


class Collectives(TorchDispatchMode):
    """Counts the collectives in its context by operator, and all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if function.namespace == "c10d":
            self.calls[function._schema.name.removeprefix("c10d::").strip("_")] += 1
        return function(*args, **(kwargs or {}))

    def by_kind(self) -> dict[str, int]:
        """Returns the number of calls by the values of KINDS, `other_collectives` and `collectives`, their sum."""
        counts = dict.fromkeys((*KINDS.values(), "other_collectives"), 0)
        for name, calls in self.calls.items():
            column = next((column for start, column in KINDS.items() if name.startswith(start)), "other_collectives")
            counts[column] += calls
        return {**counts, "collectives": self.calls.total()}


def fake_world(ranks: int) -> World:
    """Makes this process rank 0 of `ranks` ranks that do not exist. The content of gathered tensors is undefined."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "DS_ACCELERATOR": "cpu"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    return World(0, ranks, 0, torch.device("cpu"))


def build(shape: Shape, *, whole: bool = False) -> nn.Module:
    """Returns the two-tower model, narrow; with `whole` in the width of 0.3B, on the meta device."""
    narrow_text = {"hidden_size": WIDTH, "heads": HEADS, "intermediate_size": 4 * WIDTH}
    text = WHOLE_TEXT.model_copy(update={"layers": shape.text_layers, **({} if whole else narrow_text)})
    encoder = {
        "hidden_size": WHOLE.hidden_size if whole else WIDTH,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": WHOLE.num_attention_heads if whole else HEADS,
        "intermediate_size": WHOLE.intermediate_size if whole else WHOLE.intermediate_size * WIDTH // WHOLE.hidden_size,
    }
    embedded = WHOLE.hidden_size if whole else WIDTH
    config = ModelConfig(encoder=encoder, pool_heads=HEADS, embed_dim=embedded, text=text)
    vocabulary = WHOLE_TEXT.vocab_size if whole else VOCABULARY
    with torch.device("meta" if whole else "cpu"):
        return build_contrastive(config, vocab_size=vocabulary, eos_id=1, pad_id=0, seed=0)


def configuration(name: str, shape: Shape, model: nn.Module) -> dict[str, Any]:
    """Returns a JSON of `ds_configs/` with buckets and the persistence threshold that fit the narrow model."""
    content = read_deepspeed(name)
    if content.get(SHARDING) == NODE:
        content[SHARDING] = NODE_RANKS
    zero = content["zero_optimization"]
    whole = [parameter.numel() for parameter in build(shape, whole=True).parameters()]
    narrow = [parameter.numel() for parameter in model.parameters()]
    for key in SIZES:
        if key in zero:
            zero[key] = max(64, zero[key] * sum(narrow) // sum(whole) // 64 * 64)
    if limit := zero.get(THRESHOLD):
        small = [mine for mine, full in zip(narrow, whole, strict=True) if full < limit]
        zero[THRESHOLD] = 1 + max(small, default=0)
    return content | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }


def pack() -> tuple[Tensor, ...]:
    """Returns the inputs of a pack of two images of 16 patches with captions: small, so that the host is the limit."""
    grids = torch.tensor([[1, 4, 4]] * 2)
    pixels = torch.randint(0, 256, (2 * 16 * 588,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, torch.tensor([1, 1]), grids, torch.ones(2, 8, dtype=torch.int64), torch.tensor([8, 8])


def plain_step(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Runs forward and backward without DeepSpeed, which replaces torch's `linear` in the whole process under
    ZeRO-3."""
    replaced, F.linear = F.linear, LINEAR
    model.zero_grad(set_to_none=True)
    sum(output.sum() for output in model(*inputs)[:4]).backward()
    F.linear = replaced


def engine_step(engine: Engine, inputs: Sequence[Tensor]) -> list[float]:
    """Runs a step of the engine. Returns the CPU seconds of forward, backward and update."""
    times = [time.process_time()]
    engine.zero_grad(1e-6)
    outputs = engine(*inputs)
    times.append(time.process_time())
    engine.backward(sum(output.sum() for output in outputs[:4]))
    times.append(time.process_time())
    engine.step()
    times.append(time.process_time())
    return [end - start for start, end in itertools.pairwise(times)]


def count(engine: Engine, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Returns the collectives of one step, see `Collectives.by_kind`."""
    with Collectives() as collectives:
        engine_step(engine, inputs)
    return collectives.by_kind()


def measure(name: str, ranks: int, steps: int, shape: Shape) -> dict[str, Any]:
    """Returns the row of one ZeRO configuration and number of ranks. Must run in a process of its own."""
    torch.set_num_threads(1)
    world = fake_world(ranks)
    model = build(shape)
    content = configuration(name, shape, model)
    plain = copy.deepcopy(model).bfloat16()
    tensors = sum(1 for _ in model.parameters())
    engine = build_engine(model, OptimizerConfig(), content, world)
    inputs = pack()
    for _ in range(WARM_UP):
        engine_step(engine, inputs)
        plain_step(plain, inputs)
    counts = count(engine, inputs)
    parts, alone = [], []
    for _ in range(steps):
        parts.append(engine_step(engine, inputs))
        alone.append(_seconds(lambda: plain_step(plain, inputs)))
    forward, backward, update = (statistics.median(column) for column in zip(*parts, strict=True))
    host, floor = statistics.median(map(sum, parts)), statistics.median(alone)
    return {
        "configuration": name,
        "ranks": ranks,
        "blocks": shape.blocks,
        "text_layers": shape.text_layers,
        "tensors": tensors,
        "partitioned_tensors": sum(1 for _ in engine.module.parameters()),
        "plain_ms": round(1e3 * floor, 1),
        "host_ms": round(1e3 * host, 1),
        "ratio": round(host / floor, 2),
        "forward_ms": round(1e3 * forward, 1),
        "backward_ms": round(1e3 * backward, 1),
        "update_ms": round(1e3 * update, 1),
        **counts,
        "steps": steps,
        "updated": engine.updated,
    }


def _seconds(action: Callable[[], None]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    """Measures every configuration and number of ranks that the command line asks for, each in a new process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64, 256, 1024], help="numbers of ranks")
    parser.add_argument("--configurations", nargs="+", default=CONFIGURATIONS, help="names of files in ds_configs/")
    parser.add_argument("--steps", type=int, default=7, help="steps that are measured (default 7)")
    parser.add_argument("--label", default="", help="a name of the code that is measured, a column of the rows")
    parser.add_argument("--one", metavar="CONFIGURATION", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.ranks[0], options.steps, Shape())), flush=True)
        os._exit(0)  # the fake process group has nothing to close
    for configuration_name in options.configurations:
        for ranks in options.ranks:
            command = [sys.executable, __file__, "--one", configuration_name, "--ranks", str(ranks)]
            command += ["--steps", str(options.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row = {"label": options.label, **json.loads(done.stdout.splitlines()[-1]), **_machine()}
            name = f"{configuration_name} {ranks:5} ranks"
            print(f"{name}: {row['ratio']} times the plain model, {row['collectives']} collectives", flush=True)
            add_rows(RESULTS / "bench_host.csv", [row])


def _machine() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "commit": git_commit(),
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
