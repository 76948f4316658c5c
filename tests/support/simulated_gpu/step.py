"""Training steps of a run on a simulated GPU: a program, started by `environment.run_simulated`.

    python -m tests.support.simulated_gpu.step '[{"zero": 3, "ranks": 256}, ...]'

It prints one line of JSON for each case. A case trains a small run as `univitar-ds train` does, from a run folder, as
rank 0 of a fake process group: `loop.train` builds the engine with `assembly`, reads shards, trains, logs and saves.
"""

from __future__ import annotations

import json
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

from tests.support.simulated_gpu import attention, patches
from tests.support.simulated_gpu.gpu import Record, SimulatedGPU


@dataclass(frozen=True)
class Case:
    """A run of `steps` steps. `changes` are keys of the run file; `packs` is the number of packs per rank and step.

    `flash` is the version of flash-attn that is installed. `teacher` is the kind of teacher: "own", an encoder of this
    project, or a `model_type` of transformers.
    """

    zero: int = 2
    ranks: int = 1
    packs: int = 2
    steps: int = 2
    flash: str | None = None
    teacher: str | None = None
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
    """Trains the run of a case. Returns the records of the last step, of everything around it, and of the end."""
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
        config = small_config(shards, output).model_dump(mode="json")
        config["stages"] = [config["stages"][0]]
        config["deepspeed"] = f"zero{case.zero}"
        config["data"]["lanes"] = case.packs * case.ranks
        for key, value in case.changes.items():
            *path, last = key.split(".")
            place = config
            for name in path:
                place = place[int(name)] if name.isdigit() else place[name]
            place[last] = value
        run = create_run(check_config(config, "the test"), "the test", case.ranks)
        config = check_config(config, "the test")
        recorder = stack.enter_context(recorded(gpu, case.steps))
        world = World(0, case.ranks, 0, torch.device("cuda", 0))
        if case.flash:
            stack.enter_context(attention.installed(case.flash, gpu))
        stack.enter_context(gpu)
        loop.train(config, run, world, recorder)
        return {name: _plain(record) for name, record in recorder.records.items()} | {
            "checkpoint": sorted(path.name for path in run.glob("checkpoints/*/*")),
            "metrics": sorted(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])),
        }


class Recorder:
    """Records the phases of a run, and asks it to stop after some steps, as `preemption.Stop`."""

    remedy = ""

    def __init__(self, gpu: SimulatedGPU, steps: int) -> None:
        self.gpu, self.steps = gpu, steps
        self.records: dict[str, Record] = {}
        self.done = 0

    @property
    def requested(self) -> bool:
        return self.done >= self.steps

    @contextmanager
    def deferred(self):
        yield


@contextmanager
def recorded(gpu: SimulatedGPU, steps: int):
    """Divides the work of the trainer into the records `build`, `step` (the last one), `between` (after a step and
    before the next: reading, reduced metrics, logs) and `save`."""
    from univitar_ds.model.teacher import teacher
    from univitar_ds.training import assembly, loop

    recorder = Recorder(gpu, steps)
    build, step, save = assembly.build_engine, loop._Trainer._step, loop._Trainer._save

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
        recorder.records["step"] = gpu.reset()
        with gpu.during("step"):
            result = step(self, *arguments)
        recorder.done += 1
        gpu.reset()
        return result

    def saved(*arguments: Any) -> Any:
        gpu.reset()
        recorder.records["save"] = gpu.record
        try:
            return save(*arguments)
        finally:
            gpu.reset()

    gpu.reset()
    with (
        mock.patch.object(assembly, "build_engine", without_data),
        mock.patch.object(loop._Trainer, "_step", one_step),
        mock.patch.object(loop._Trainer, "_save", saved),
        mock.patch.object(teacher, "_own_encoder", read(teacher._own_encoder)),
        mock.patch.object(teacher, "_image_model", read(teacher._image_model)),
        patches.launches_counted(gpu),
    ):
        yield recorder


def _plain(record: Record) -> dict[str, Any]:
    return {name: dict(sorted(value.items())) for name, value in vars(record).items()}


if __name__ == "__main__":
    main()
