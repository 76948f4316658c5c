"""Training steps of a run on a simulated GPU: a program, started by `environment.run_simulated`.

    python -m tests.support.simulated_gpu.step '[{"zero": 3, "ranks": 256}, ...]'

It prints one line of JSON for each case. A case trains a small run as `univitar-ds train` does, from a run folder, as
rank 0 of a fake process group: `loop.train` builds the engine with `assembly`, reads shards, trains, logs and saves.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from univitar_ds.simulation import attention, patches
from univitar_ds.simulation.gpu import Record, SimulatedGPU


@dataclass(frozen=True)
class Case:
    """A run of `steps` steps. `changes` are keys of the run file; `packs` is the number of packs per rank and step.

    `flash` is the version of flash-attn that is installed. `teacher` is the kind of teacher: "own", an encoder of this
    project, or a `model_type` of transformers. `not_finite` are the steps, from 1 on, whose loss and gradient are NaN.
    `evaluates`: whether the weights are evaluated after each step but the last. `resumed` is the number of steps of a
    second launch, which reads the checkpoint of the first.
    """

    zero: int = 2
    ranks: int = 1
    packs: int = 2
    steps: int = 2
    flash: str | None = None
    teacher: str | None = None
    not_finite: list[int] = field(default_factory=list)
    evaluates: bool = False
    resumed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    gpu = SimulatedGPU()
    patches.patch_torch(gpu)
    with tempfile.TemporaryDirectory() as folder:
        from tests.support.shards import write_demo_shards

        shards = write_demo_shards(Path(folder, "shards"), images=96, videos=0, shards=1)
        for number, content in enumerate(json.loads(sys.argv[1])):
            begin = time.process_time()
            case = Case(**content)
            if case.teacher:
                case.changes["objective.teacher"] = {"path": stored_teacher(case.teacher, Path(folder, case.teacher))}
            records = trained(case, gpu, shards, Path(folder, str(number)))
            print(json.dumps({"cpu_s": round(time.process_time() - begin, 1), **records}), flush=True)


def stored_teacher(kind: str, folder: Path) -> str:
    """Saves a small teacher, in place of a downloaded one. Returns its folder."""
    from tests.support.teachers import image_model, own_encoder

    (own_encoder() if kind == "own" else image_model(kind)).save_pretrained(folder)
    return str(folder)


def trained(case: Case, gpu: SimulatedGPU, shards: Path, output: Path) -> dict[str, Any]:
    """Trains the run of a case. Returns the records of the last step and of what is around it, see `recorded`, the
    files of the last checkpoint, the names of the last metrics, and the events of the run."""
    from tests.support.runs import small_config
    from univitar_ds.config.load import check_config
    from univitar_ds.run import create_run
    from univitar_ds.training import loop
    from univitar_ds.training.distributed.process_group import World
    from univitar_ds.training.engine.engine import load_deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(case.ranks))
    with patches.world(case.ranks), ExitStack() as stack:
        load_deepspeed()
        patches.patch_deepspeed()
        content = changed(small_config(shards, output).model_dump(mode="json"), case, shards)
        run = create_run(check_config(content, "the test"), "the test", case.ranks)
        config = check_config(content, "the test")
        recorder = stack.enter_context(recorded(gpu, case))
        world = World(0, case.ranks, 0, torch.device("cuda", 0))
        if case.flash:
            stack.enter_context(attention.installed(case.flash, gpu))
        stack.enter_context(gpu)
        loop.train(config, run, world, recorder, evaluation_of(case, config, run, world))
        if case.resumed:
            recorder.last += case.resumed
            loop.train(config, run, world, recorder)
        return {name: _plain(record) for name, record in recorder.records.items()} | {
            "checkpoint": sorted(path.name for path in max(run.glob("checkpoints/step-*")).iterdir()),
            "metrics": sorted(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])),
            "events": [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()],
        }


def changed(content: dict[str, Any], case: Case, shards: Path) -> dict[str, Any]:
    """Returns the run file of a case. Args: content: of the run file that the case changes."""
    content["stages"] = [{**content["stages"][0], "samples": 100_000}]  # a step of 256 ranks has 1,500
    content["deepspeed"] = f"zero{case.zero}"
    content["data"]["lanes"] = case.packs * case.ranks
    if case.evaluates:
        content["evaluation"] |= {"every_samples": 1, "sources": [{"path": str(shards)}]}
    for key, value in case.changes.items():
        *path, last = key.split(".")
        place = content
        for name in path:
            place = place[int(name)] if name.isdigit() else place[name]
        place[last] = value
    return content


def evaluation_of(case: Case, *run: Any) -> Any:
    """Returns the evaluation during the run, None without one. Args: run: arguments of `DuringTraining`."""
    from univitar_ds.evaluation import during_training

    during_training.wait_for_all = lambda world: None  # the other ranks never come
    return during_training.DuringTraining(*run) if case.evaluates else None


class Recorder:
    """Records the phases of a run, and asks it to stop after step `last`, as `preemption.Stop`."""

    remedy = ""

    def __init__(self, gpu: SimulatedGPU, last: int) -> None:
        self.gpu, self.last = gpu, last
        self.records: dict[str, Record] = {}
        self.done = 0

    @property
    def requested(self) -> bool:
        return self.done >= self.last

    @contextmanager
    def deferred(self):
        yield

    def during(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `function`, whose calls are recorded as `phase`. The last one that used the device is kept."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            record = self.gpu.reset()
            try:
                with self.gpu.during(phase):
                    return function(*arguments, **options)
            finally:
                if record.waits or record.launches:
                    self.records[phase] = record
                self.gpu.reset()

        return wrapped


@contextmanager
def recorded(gpu: SimulatedGPU, case: Case):
    """Divides the work of the trainer into the records `build`, `step`, `between` (after a step and before the next:
    reading, reduced metrics, logs), `evaluation`, `save` and `load`. The last record of each is kept."""
    from univitar_ds.model.teacher import teacher
    from univitar_ds.training import assembly, loop
    from univitar_ds.training.mid_evaluation import MidEvaluation

    recorder = Recorder(gpu, case.steps)
    build, step, due = assembly.build_engine, loop._Trainer._step, MidEvaluation.due

    def without_data(model: Any, *arguments: Any) -> Any:
        patches.without_data(model, gpu)
        return build(model, *arguments)

    def read(function: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        """A teacher is read outside of the simulation, since its files have values."""

        def teacher_without_data(*arguments: Any) -> torch.nn.Module:
            with _disable_current_modes():
                model = function(*arguments)
            patches.without_data(model, gpu)
            return model

        return teacher_without_data

    def one_step(self: Any, *arguments: Any) -> Any:
        recorder.records["between" if recorder.done else "build"] = gpu.record
        recorder.done += 1
        gpu.unknown = math.nan if recorder.done in case.not_finite else 1.0
        try:
            return recorder.during("step", step)(self, *arguments)
        finally:
            gpu.unknown = 1.0

    def due_before_last(self: Any, state: Any) -> bool:
        return not recorder.requested and due(self, state)  # a run that is asked to stop evaluates nothing

    gpu.reset()
    with (
        mock.patch.object(assembly, "build_engine", without_data),
        mock.patch.object(assembly, "load_checkpoint", recorder.during("load", assembly.load_checkpoint)),
        mock.patch.object(loop._Trainer, "_step", one_step),
        mock.patch.object(loop._Trainer, "_save", recorder.during("save", loop._Trainer._save)),
        mock.patch.object(MidEvaluation, "due", due_before_last),
        mock.patch.object(MidEvaluation, "run", recorder.during("evaluation", MidEvaluation.run)),
        mock.patch.object(teacher, "_own_encoder", read(teacher._own_encoder)),
        mock.patch.object(teacher, "_image_model", read(teacher._image_model)),
        patches.launches_counted(gpu),
    ):
        yield recorder


def _plain(record: Record) -> dict[str, Any]:
    return {name: dict(sorted(value.items())) for name, value in vars(record).items() if name != "moment"}


if __name__ == "__main__":
    main()
