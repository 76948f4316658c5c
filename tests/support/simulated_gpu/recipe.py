"""One training step of a shipped recipe at full size on a simulated GPU: a program that prints a line of JSON.

    python -m tests.support.simulated_gpu.recipe '{"recipe": "univitar_0p3b", "zero": 2, "ranks": 8, "recompute": 1}'

The model is built without values, and the packs are images of 1,024 tokens with captions of 40. There is no teacher.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from tests.support.paths import ROOT
from tests.support.simulated_gpu import attention, patches
from tests.support.simulated_gpu.gpu import Record, SimulatedGPU

if TYPE_CHECKING:
    from univitar_ds.planning.memory import Peak

SIDE = 32
"""Rows and columns of patches of an image."""
CAPTION = 40
KINDS = ("allgather", "reduce_scatter", "allreduce")
PHASES = {"__call__": "forward", "backward": "backward", "step": "update"}
"""The phase of a step by method of the engine."""


@dataclass(frozen=True)
class Setting:
    """`recompute` is `model.checkpoint_every`; `packs` is the number of packs per rank and step."""

    recipe: str
    zero: int = 2
    ranks: int = 8
    packs: int = 1
    recompute: int = 1
    tokens: int = 32768
    flash: str = "flash3"


def main() -> None:
    setting = Setting(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(setting) | measured(setting)))


def measured(setting: Setting) -> dict[str, Any]:
    """Returns the numbers of the second step."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(setting.ranks))
    gpu = SimulatedGPU()
    patches.patch_torch(gpu)
    with patches.world(setting.ranks), ExitStack() as stack:
        from univitar_ds.training.engine.engine import Engine, load_deepspeed
        from univitar_ds.training.step.train_step import StepSettings, train_step

        load_deepspeed()
        patches.patch_deepspeed()
        stack.enter_context(attention.installed(setting.flash, gpu))
        stack.enter_context(gpu)
        stack.enter_context(patches.launches_counted(gpu))
        engine, objective = _engine(setting, gpu)
        stack.enter_context(_phases(Engine, gpu))
        packs = [_pack(setting.tokens, lane) for lane in range(setting.packs)]
        for _ in range(2):  # the first step allocates states that stay
            record = gpu.reset()
            train_step(engine, packs, StepSettings(lr=1e-3), objective)
        gpu.reset()
        return {**_numbers(record), "foreseen_gib": round(foreseen(setting).bytes / 2**30, 2)}


def foreseen(setting: Setting) -> Peak:
    """Returns the memory of a rank as `univitar-ds plan` predicts it."""
    from univitar_ds.config.deepspeed import resolve_deepspeed
    from univitar_ds.model.build import describe
    from univitar_ds.planning.forecast.step_load import Placement, PlannedModel, load_of, states_of
    from univitar_ds.planning.memory import peak, pixel_bytes
    from univitar_ds.planning.sizes import count_parameters

    config, content = _config(setting)
    described = describe(config.model, None, vocab_size=config.model.text.vocab_size, eos_id=1, pad_id=0)
    counts = count_parameters(config, described, teacher_width=None, classes=None)
    resolved = resolve_deepspeed(config, setting.ranks, content, ("the recipe", "its DeepSpeed configuration"))
    model = PlannedModel(config, described, counts)
    stage = config.stages[0].model_copy(update={"token_budget": setting.tokens})
    items = setting.tokens // SIDE**2
    load = load_of(model, stage, setting.ranks, setting.recompute)
    load = replace(
        load, items=items, texts=items * setting.ranks * setting.packs, text=replace(load.text, length=CAPTION),
        pixels=pixel_bytes(setting.tokens, video=False), teacher=None,
    )  # fmt: skip
    return peak(load, states_of(model, stage, Placement(setting.ranks, setting.ranks, resolved)))


def _engine(setting: Setting, gpu: SimulatedGPU) -> tuple[Any, Any]:
    from univitar_ds.config.deepspeed import resolve_deepspeed
    from univitar_ds.model.build import build_contrastive
    from univitar_ds.training.distributed.process_group import World
    from univitar_ds.training.engine.engine import build_engine

    config, content = _config(setting)
    with gpu.fake:
        text = config.model.text
        model = build_contrastive(config.model, vocab_size=text.vocab_size, eos_id=1, pad_id=0, seed=0)
    patches.without_data(model, gpu)
    model.vision.checkpoint_every = setting.recompute
    ds_config = resolve_deepspeed(config, setting.ranks, content, ("the recipe", "its DeepSpeed configuration"))
    world = World(0, setting.ranks, 0, torch.device("cuda", 0))
    return build_engine(model, config.optimizer, ds_config, world), config.objective


def _config(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Returns the run file of a setting, and its DeepSpeed JSON."""
    from univitar_ds.config.load import load_config

    config = load_config(ROOT / f"univitar_ds/recipes/{setting.recipe}.yaml")
    data = config.data.model_copy(update={"lanes": setting.ranks * setting.packs})
    content = json.loads((ROOT / f"ds_configs/zero{setting.zero}.json").read_text(encoding="utf-8"))
    return config.model_copy(update={"data": data}), content


@contextmanager
def _phases(engine: Any, gpu: SimulatedGPU) -> Iterator[None]:
    def during(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            with gpu.during(phase):
                return method(*arguments)

        return wrapped

    with ExitStack() as stack:
        for name, phase in PHASES.items():
            stack.enter_context(mock.patch.object(engine, name, during(getattr(engine, name), phase)))
        yield


def _pack(tokens: int, lane: int) -> SimpleNamespace:
    items = tokens // SIDE**2
    return SimpleNamespace(
        pixels=torch.zeros(tokens * 14 * 14 * 3, dtype=torch.uint8),
        frames=torch.ones(items, dtype=torch.int64),
        grid_thw=torch.tensor([[1, SIDE, SIDE]] * items),
        token_ids=torch.zeros(items, CAPTION, dtype=torch.int64),
        text_lengths=torch.full((items,), CAPTION),
        caption_ids=torch.arange(items) + lane * items,
        lane=lane,
    )


def _numbers(record: Record) -> dict[str, Any]:
    fused = {name: count for name, count in record.launches.items() if "." in name}
    gib = {f"peak_gib_{phase}": round(record.peak.get(phase, 0) / 2**30, 2) for phase in ("build", *PHASES.values())}
    return {
        "launches": record.launches.total(),
        "fused_launches": sum(fused.values()),
        "collectives": record.collectives.total(),
        **{f"{kind}s": sum(count for name, count in record.collectives.items() if kind in name) for kind in KINDS},
        "collective_gb": round(record.collective_bytes.total() / 1e9, 2),
        "waits": record.waits.total(),
        "wait_places": len(record.waits),
        "peak_gib": round(sum(record.peak.values()) / 2**30, 2),
        **gib,
    }


if __name__ == "__main__":
    main()
