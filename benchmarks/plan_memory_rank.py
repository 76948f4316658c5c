"""One rank of a training run on a CPU whose peak memory is measured: a program that `bench_plan_memory.py` starts.

    RANK=0 WORLD_SIZE=1 python -m benchmarks.plan_memory_rank CASE_AS_JSON

The run is the real engine and training step on drawn packs, without a loader. A small model of the same kind takes a
step first, so that everything is imported and compiled; what the process then holds is subtracted. The kernel counts
the peak from the moment at which the engine is built.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.config.load import check_config
from univitar_ds.config.schema import RunConfig
from univitar_ds.geometry import PATCH
from univitar_ds.kernels.dispatch import compile_on_cpu
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import compiles
from univitar_ds.training.distributed.process_group import World, start_world, stop_world
from univitar_ds.training.engine.engine import Engine, build_engine, load_deepspeed
from univitar_ds.training.step.train_step import StepSettings, train_step

SIDE = 16
"""Rows and columns of patches of an image: 224 px."""
CAPTION = 16
VOCABULARY = 2048
WARM = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 96}


class Packs:
    """Equal packs of squares with captions."""

    def __init__(self, tokens: int, lane: int) -> None:
        items = tokens // SIDE**2
        self.pixels = torch.full((tokens * PATCH * PATCH * 3,), 7, dtype=torch.uint8)
        self.frames = torch.ones(items, dtype=torch.int64)
        self.grid_thw = torch.tensor([[1, SIDE, SIDE]] * items)
        self.token_ids = torch.ones(items, CAPTION, dtype=torch.int64)
        self.text_lengths = torch.full((items,), CAPTION)
        self.caption_ids = torch.arange(items) + lane * items
        self.lane = lane


def run_of(case: dict[str, Any]) -> RunConfig:
    """Returns the run file of a case."""
    text = {"hidden_size": 256, "layers": 4, "heads": 4, "context_length": CAPTION, "vocab_size": VOCABULARY}
    return check_config(
        {
            "name": "memory",
            "model": {"encoder": case["encoder"], "checkpoint_every": case["recompute"], "text": text},
            "data": {"sources": [{"path": "none"}], "lanes": case["ranks"] * case["packs"], "workers": 0},
            "stages": [
                {
                    "name": "only",
                    "samples": 1000,
                    "image": {"kind": "fixed", "size_px": SIDE * PATCH},
                    "token_budget": case["tokens"],
                    "lr": 1e-4,
                }
            ],
            "optimizer": case.get("optimizer", {}),
            "objective": {"chunk": 64},
        },
        "the benchmark",
    )


def deepspeed_of(case: dict[str, Any]) -> dict[str, Any]:
    """Returns the DeepSpeed JSON of a case."""
    zero = {"stage": case["zero"], "overlap_comm": False, "contiguous_gradients": True}
    zero |= {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
    if case["zero"] == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2_000_000}
        zero |= {"stage3_max_live_parameters": case.get("live", 0), "stage3_max_reuse_distance": case.get("live", 0)}
        zero |= {"sub_group_size": case.get("sub_group", 1_000_000_000)}
    precision = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if case["bf16"] else {}
    return {**precision, "zero_optimization": zero}


def alone(case: dict[str, Any]) -> dict[str, int]:
    """Measures forward and backward pass of the model without an engine."""
    config = run_of(case)
    compile_on_cpu(compiles(config.model))

    def run(changed: dict[str, Any]) -> tuple[int, int]:
        own = run_of(changed).model
        model = build_contrastive(own, vocab_size=VOCABULARY, eos_id=1, pad_id=0, seed=0)
        model = model.bfloat16() if case["bf16"] else model
        model.vision.checkpoint_every = case["recompute"]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        pack = Packs(changed["tokens"], 0)
        found = model(pack.pixels, pack.frames, pack.grid_thw, pack.token_ids, pack.text_lengths)
        (found.vision.sum() + found.text.sum() + found.scale.sum() + found.bias.sum()).backward()
        return _status("VmHWM"), sum(one.numel() for one in model.parameters())

    run({**case, "encoder": WARM, "tokens": 2 * SIDE**2})
    gc.collect()
    before = held()
    peak, parameters = run(case)
    return {"imports": before, "peak": peak - before, "parameters": parameters}


def built(case: dict[str, Any], world: World) -> tuple[Engine, RunConfig]:
    config = run_of(case)
    compile_on_cpu(compiles(config.model))
    model = build_contrastive(config.model, vocab_size=VOCABULARY, eos_id=1, pad_id=0, seed=0)
    model.vision.checkpoint_every = case["recompute"]
    content = resolve_deepspeed(config, world.size, deepspeed_of(case), ("the case", "its DeepSpeed JSON"))
    return build_engine(model, config.optimizer, content, world), config


def step(engine: Engine, config: RunConfig, case: dict[str, Any]) -> None:
    packs = [Packs(case["tokens"], lane) for lane in engine.world.lanes(config.data.lanes)]
    train_step(engine, packs, StepSettings(lr=1e-6), config.objective)


def held() -> int:
    """Returns the resident bytes of this process."""
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def main() -> None:
    case = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    world = start_world()
    load_deepspeed()
    if case["zero"] is None:
        print(json.dumps(alone(case)))
        return
    small = {**case, "encoder": WARM, "tokens": 2 * SIDE**2, "packs": 1}
    compiled = compiles(run_of(case).model)
    engine, config = built(small, world)
    compile_on_cpu(compiled)
    step(engine, config, small)
    engine.close()
    del engine
    gc.collect()
    before = held()
    engine, config = built(case, world)
    gc.collect()
    resident = held()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(case.get("steps", 2)):
        step(engine, config, case)
    peak = _status("VmHWM")
    parameters = sum(getattr(one, "ds_numel", one.numel()) for one in engine.module.parameters())
    print(json.dumps({"imports": before, "built": resident - before, "peak": peak - before, "parameters": parameters}))
    sys.stdout.flush()
    if world.size == 1:
        stop_world()


if __name__ == "__main__":
    main()
