"""Complete runs of the trainer on small shards, as with `univitar-ds train` but without evaluation."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.support.closeness import adam_reach, encoder_terms, entry_bound, gradient_terms, transformer_terms
from univitar_ds.config.load import check_config, load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.config.schema import RunConfig
from univitar_ds.formats.elastic import ElasticReader
from univitar_ds.model.config import PRESETS


def small_config(shards: Path, output: Path, **changes: Any) -> RunConfig:
    """A run with two stages of a few steps, the second with videos; 4 lanes, all logs, a checkpoint every second
    step."""
    sizes = {"min_tokens": 4, "max_tokens": 24, "divisor_px": 14}
    stage = {"image": sizes, "video": {**sizes, "max_tokens": 48}, "video_frames": 4, "token_budget": 96, "lr": 1e-3}
    content = {
        "name": "small",
        "output": str(output),
        "model": {
            "embed_dim": 32,
            "text": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64, "vocab_size": 300},
        },
        "data": {"sources": [{"path": str(shards)}], "lanes": 4, "workers": 0, "pool_samples": 24, "log_samples": True},
        "stages": [
            {"name": "images", "samples": 60, "warmup_samples": 20, **stage},
            {"name": "both", "samples": 60, "video_ratio": 0.5, **stage},
        ],
        "checkpoint": {"every_steps": 2, "keep": 100},
        "logging": {"every_steps": 1, "tensorboard": False, "peak_tflops": 0.05},
    }
    return check_config({**content, **changes}, "the test")


TERMS = gradient_terms(
    encoder_terms(PRESETS["tiny"], 48) + transformer_terms(width=192, inner=64, head=64, layers=2, longest=48), 4 * 96
)
"""`terms` of a gradient of `small_config`'s model in one step: encoder, pooling or text tower, and heads; the last sums
are over the tokens of four lanes."""


def reach_of(run: Path) -> dict[str, Tensor]:
    """`adam_reach` of a whole run, from the second moments in each checkpoint for the steps since the previous one."""
    lines = {line["step"]: line for line in metrics(run)}
    reach: dict[str, Tensor] = {}
    before = 0
    for folder in sorted((run / CHECKPOINTS).glob("step-*")):
        step = int(folder.name.removeprefix("step-"))
        lr = sum(lines[number]["lr"] for number in range(before + 1, step + 1))
        for name, square in _second_moments(folder).items():
            square = square / (1 - 0.98**step)
            error = entry_bound(TERMS * step, square.max().sqrt().item(), torch.float32)
            reach[name] = reach.get(name, 0.0) + adam_reach(square, lr, error)
        before = step
    return reach


def _second_moments(folder: Path) -> dict[str, Tensor]:
    with ExitStack() as files:
        reader = ElasticReader(folder, files)
        trained = [name for name, kinds in reader.kinds.items() if "exp_avg_sq" in kinds]
        return {name: reader.read(name, "exp_avg_sq").double() for name in trained}


def train_rank(run: Path) -> bool:
    """Train as one rank of the run; for `run_distributed`."""
    from univitar_ds.training.distributed.process_group import start_world
    from univitar_ds.training.loop import train

    return train(load_config(run / "config.yaml"), run, start_world())


MESSAGES = ("all_gather_single", "all_reduce", "gather", "broadcast", "scatter")
"""Functions of torch.distributed that send a message."""


def counted_rank(run: Path) -> tuple[list[int], list[int]]:
    """Trains as `train_rank`. Returns the numbers of messages that `process_group` sends in each step, and between the
    starts of consecutive steps."""
    from univitar_ds.training import loop
    from univitar_ds.training.distributed import process_group

    class Counting:
        """torch.distributed, as one module sees it."""

        sent = 0

        def __getattr__(self, name: str) -> Any:
            if name in MESSAGES:
                Counting.sent += 1
            return getattr(dist, name)

    steps, begins = [], []
    step = loop._Trainer._step

    def counted(self: Any, *arguments: Any) -> Any:
        begins.append(Counting.sent)
        found = step(self, *arguments)
        steps.append(Counting.sent - begins[-1])
        return found

    loop._Trainer._step = counted
    process_group.dist = Counting()
    train_rank(run)
    between = [after - before for before, after in itertools.pairwise(begins)]
    return steps, between


def train_without_launcher(run: Path) -> bool:
    """Train as the only rank, without the variables of a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    return train_rank(run)


def rewound(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as after a crash between the checkpoint of `step` and the next one; logs have later steps."""
    shutil.copytree(run, to)
    for folder in (to / CHECKPOINTS).glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (to / CHECKPOINTS / "latest").write_text(f"step-{step:08d}\n")
    with (to / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # truncated by the crash
    return to


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def samples(run: Path) -> dict[tuple[int, int], list[str]]:
    """Modality and keys by (step, lane), from the logs of all ranks. Duplicates are an error."""
    seen: dict[tuple[int, int], list[str]] = {}
    for path in run.glob("samples-rank*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            place = row["step"], row["lane"]
            assert place not in seen, f"step and lane {place} are logged twice"
            seen[place] = [row["modality"], *row["keys"]]
    return seen
