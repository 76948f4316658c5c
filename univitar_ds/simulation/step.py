"""One training step of a run at full size on a simulated GPU, as rank 0 of any number of ranks.

Model, engine, loss and optimizer are those of the trainer (`training.assembly`, `training.step`). Weights have no
values, packs are full of items of one size, and captions have full length. A teacher is a DINOv2 of its width and
number of blocks. All ranks are assumed to do what rank 0 does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from univitar_ds.classes import ClassList
from univitar_ds.config.load import check_config
from univitar_ds.config.model import TeacherConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.geometry import TUBELET, Modality, item_bytes
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.described import build_described
from univitar_ds.model.teacher import teacher as teachers
from univitar_ds.plugins import load_plugins
from univitar_ds.simulation import attention, patches
from univitar_ds.simulation.gpu import Record, SimulatedGPU
from univitar_ds.training.assembly import prepare_model
from univitar_ds.training.distributed.groups import groups_of
from univitar_ds.training.distributed.process_group import World
from univitar_ds.training.engine.engine import Engine, build_engine, load_deepspeed
from univitar_ds.training.step import classification, distillation, train_step
from univitar_ds.training.step.pack_share import share_of

STATES = ("weights", "gradients", "optimizer", "average", "teacher")
"""Parts of the memory that stay between steps, see `Engine.memory_by_part`."""
OTHER_STATES = "other states"
"""Memory that stays between steps and belongs to none of STATES, such as buckets."""
HEADS = "pooling and heads"
"""Memory of a forward pass outside of the towers, and copies of what the step reports."""
BACKWARD = "backward pass"
"""Memory of the backward passes: gradients of activations and weights, recomputed activations, buckets."""


@dataclass(frozen=True)
class Setting:
    """A step of a run, of values that JSON can express.

    `config`: the run file; `stage`: index of the stage; `description`: of the model, see `model.build`; `classes`:
    number of classes, None for a contrastive model; `teacher`: its (width, blocks), None without one; `ranks`: number
    of ranks; `deepspeed`: the complete DeepSpeed configuration; `recompute`: as `checkpoint_every`; `kept`: packs whose
    autograd graphs are in memory together; `modality`, `items`, `grid`: of a pack, (t, h, w) of each item; `caption`:
    tokens of a caption; `flash`: the stand-in that computes the attention, a key of `attention.MODULES`.
    """

    config: Mapping[str, Any]
    stage: int
    description: Mapping[str, Any]
    classes: int | None
    teacher: tuple[int, int] | None
    ranks: int
    deepspeed: Mapping[str, Any]
    recompute: int | str
    kept: int
    modality: Modality
    items: int
    grid: tuple[int, int, int]
    caption: int
    flash: str = "flash3"


def simulated(setting: Setting) -> dict[str, Any]:
    """Returns what the second step of a run does, since the first one allocates states that stay.

    `peak`: bytes of the GPU's memory by part, at the moment of the maximum; `moment`: the part that was growing then;
    `launches`: number of kernels; `fused`: those of this project and of the attention among them; `collectives`,
    `collective_bytes`: number and bytes (in and out) of collectives by operation; `waits`: how often the host waits for
    the GPU, by place.
    """
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(setting.ranks))
    cfg = check_config(dict(setting.config), "the run file")
    load_plugins(cfg.plugins)
    gpu = SimulatedGPU()
    patches.patch_torch(gpu)
    with patches.world(setting.ranks), ExitStack() as stack:
        load_deepspeed()
        patches.patch_deepspeed()
        stack.enter_context(attention.installed(setting.flash, gpu))
        stack.enter_context(gpu)
        stack.enter_context(patches.launches_counted(gpu))
        trainer = _Trainer(cfg, setting, gpu)
        stack.enter_context(trainer.phases())
        trainer.step()
        record = gpu.reset()
        trainer.step()
        gpu.reset()
        return _result(record, gpu.live, trainer.states())


class _Trainer:
    """The engine of a run, and the packs of a step."""

    def __init__(self, cfg: RunConfig, setting: Setting, gpu: SimulatedGPU) -> None:
        self.cfg, self.setting, self.gpu = cfg, setting, gpu
        self.stage = cfg.stages[setting.stage]
        world = World(0, setting.ranks, 0, torch.device("cuda", 0))
        self.groups = groups_of(cfg, world)
        with gpu.fake:
            width = None if setting.teacher is None else setting.teacher[0]
            model = build_described(cfg, setting.description, teacher_width=width, classes=setting.classes)
            prepare_model(model, cfg, self.stage, self.groups)
        patches.without_data(model, gpu)
        model.vision.checkpoint_every = setting.recompute
        self.engine = build_engine(model, cfg.optimizer, dict(setting.deepspeed), world, None, self.groups)
        self.teacher = None
        if setting.teacher is not None and self.stage.distill.ever:
            self.teacher = self._teacher(cfg.objective.teacher, *setting.teacher)
        lanes = self.groups.lanes(cfg)
        self.packs = [share_of(_pack(setting, lane), self.groups.sequence) for lane in lanes]

    def _teacher(self, config: TeacherConfig, width: int, layers: int) -> teachers.Teacher:
        with _disable_current_modes():  # transformers reads values that it computes on the CPU
            model, shape = teachers.dinov2_without_values(width, layers, config)
        patches.without_data(model, self.gpu)
        own = config.model_copy(update={"cache": None})
        merge = self.engine.module.vision.config.spatial_merge_size
        with self.gpu.during("teacher"):
            return teachers.teacher_of(model, shape, own, merge=merge, device=self.engine.world.device)

    def step(self) -> None:
        """Computes one step of the stage."""
        encoder = self.engine.module.vision.config
        settings = train_step.StepSettings(
            lr=1e-3,
            distill_weight=0.0 if self.teacher is None else 1.0,
            dropping=DropConfig.of(self.stage, encoder, seed=self.cfg.seed, step=0),
            keep=self.setting.kept,
        )
        arguments = self.engine, self.packs, settings, self.cfg.objective
        with self.gpu.during(HEADS):
            if self.setting.classes is None:
                train_step.train_step(*arguments, self.teacher)
            else:
                classes = ClassList({None: map(str, range(self.setting.classes))})
                classification.classification_step(*arguments, classes, self.teacher)

    def states(self) -> dict[str, int]:
        """Returns the bytes of the parts that stay between steps."""
        held = self.engine.memory_by_part(None if self.teacher is None else self.teacher.tower.model)
        return {part: held.get(part, 0) for part in STATES}

    @contextmanager
    def phases(self) -> Iterator[None]:
        """Attributes memory that a step allocates to the part of the step that allocates it."""
        model = self.engine.module
        places: list[tuple[Any, str, str]] = [
            (type(model.vision), "forward", "encoder activations"),
            (Engine, "backward", BACKWARD),
            (Engine, "step", "update"),
            (train_step, "_contrastive", "loss"),
            (train_step, "pixels_on", "pixels"),
            (classification, "pixels_on", "pixels"),
            (teachers.Teacher, "__call__", "teacher"),
            (distillation.Distillation, "loss", "teacher"),
        ]
        if self.setting.classes is None:
            places.append((type(model.text), "forward", "text tower"))
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(mock.patch.object(owner, name, _during(self.gpu, getattr(owner, name), part)))
            fetching = getattr(getattr(self.engine._optimizer, "parameter_offload", None), "param_coordinator", None)
            if fetching is not None:  # of ZeRO-3
                fetch = _during(self.gpu, fetching.fetch_sub_module, "gathered weights")
                stack.enter_context(mock.patch.object(fetching, "fetch_sub_module", fetch))
            yield


def _during(gpu: SimulatedGPU, function: Callable[..., Any], part: str) -> Callable[..., Any]:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with gpu.during(part):
            return function(*arguments, **options)

    return wrapped


def _pack(setting: Setting, lane: int) -> PackedBatch:
    frames = 1 if setting.modality == "image" else setting.grid[0] * TUBELET
    count, caption = setting.items, setting.caption
    return PackedBatch(
        pixels=torch.zeros(count * item_bytes(setting.grid, frames), dtype=torch.uint8),
        frames=torch.full((count,), frames),
        grid_thw=rows([setting.grid] * count, 3),
        token_ids=torch.zeros(count, caption, dtype=torch.int64),
        text_lengths=torch.full((count,), caption),
        caption_ids=torch.arange(count) + lane * count,
        captions=[""] * count,
        labels=["0"] * count,
        sets=[None] * count,
        keys=[f"{lane}/{item}" for item in range(count)],
        modality=setting.modality,
        lane=lane,
        index=0,
    )


def _result(record: Record, live: Mapping[str, int], states: Mapping[str, int]) -> dict[str, Any]:
    """Args: live: bytes by phase after the step; states: bytes by part, which stay between steps."""
    peak = Counter({part: size - live.get(part, 0) for part, size in record.peak.items()})
    staying = sum(live.values())
    peak.update(states)
    peak[OTHER_STATES] += staying - sum(states.values())
    return {
        "launches": record.launches.total(),
        "waits": dict(record.waits),
        "peak": {part: size for part, size in peak.items() if size},
        "moment": record.moment,
        "fused": sum(count for name, count in record.launches.items() if "." in name),
        "collectives": dict(record.collectives),
        "collective_bytes": dict(record.collective_bytes),
    }
