"""The training of a run, from one rank's point of view."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import compile_on_cpu
from univitar_ds.config.deepspeed import resolve_deepspeed
from univitar_ds.config.load import changed_result, check_config, config_fingerprint
from univitar_ds.config.run_folder import CHECKPOINTS, CONFIG, DEEPSPEED, SUMMARY, TOKENIZER
from univitar_ds.config.schema import RunConfig, StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.cursor import LaneCursor, parse
from univitar_ds.data.loader import PackLoader
from univitar_ds.data.text import load_tokenizer, special_ids
from univitar_ds.errors import CheckpointError
from univitar_ds.model.config import compiles
from univitar_ds.model.contrastive import build_contrastive
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.model.teacher import Teacher, build_teacher, read_teacher
from univitar_ds.training import commit, preemption
from univitar_ds.training.checkpoint import Saved, load_checkpoint, save_checkpoint
from univitar_ds.training.curriculum import Progress, advance, distills_later, lr_at, modality_at, weight_at
from univitar_ds.training.distributed import World, gather_json, gather_numbers, together
from univitar_ds.training.engine import Engine, build_engine, versions
from univitar_ds.training.logs import MetricLog, SampleLog, cut_sample_logs
from univitar_ds.training.metrics import Window, join_ranks, measured_tflops, rank_numbers
from univitar_ds.training.preemption import NEVER, Stop
from univitar_ds.training.step import train_step

logger = logging.getLogger(__name__)



@dataclass
class State:
    """What changes while a run trains, beside the tensors: all of it is in the checkpoint."""

    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    cursors: dict[int, LaneCursor] = field(default_factory=dict)
    """By lane: of all at the start, then of this rank's."""
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    """Spent training, over all starts of the run."""

    def to_dict(self) -> dict[str, Any]:
        """Everything but the cursors, which belong to ranks."""
        return {
            "progress": self.progress.to_dict(),
            "window": asdict(self.window),
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
        }

    @classmethod
    def of(cls, saved: Saved) -> State:
        content = saved.state
        return cls(
            Progress(**content["progress"]),
            Window(**content["window"]),
            {lane: parse(cursor) for lane, cursor in saved.cursors.items()},
            content["best"],
            content["last"],
            content["seconds"],
        )


def train(cfg: RunConfig, run: Path, world: World, stop: Stop = NEVER) -> bool:
    """Trains a run to its end, from its last checkpoint if it has one; every rank of `world` calls it.

    `run` is the run's folder with deepspeed.json and tokenizer.json; everything is written there. When `stop` of any
    rank is requested, all ranks end after the same step and save.

    Returns: whether all stages are done and no rank was told to leave; the same on all ranks.
    Raises: UserError, on all ranks, for whatever ends the run early.
    """
    lanes = world.lanes(cfg.data.lanes)
    with _engine(cfg, run, world) as engine:
        state = _restore(cfg, run, engine)
        cost = cost_coefficients(engine.module.vision.config)
        trainer = _Trainer(cfg, run, engine, lanes, cost, _peak_tflops(cfg, engine), state, stop)
        try:
            with stop.deferred():
                trainer.train()
        finally:
            trainer.close()
        if world.first:
            _write_summary(cfg, run, engine, state)
        return not trainer.told


class _Trainer:
    """One start of a run: opens the loader of each stage, steps, logs and saves."""

    def __init__(
        self,
        cfg: RunConfig,
        run: Path,
        engine: Engine,
        lanes: list[int],
        cost: tuple[float, float],
        peak_tflops: float,
        state: State,
        stop: Stop,
    ) -> None:
        self.cfg, self.run, self.engine, self.lanes, self.state = cfg, run, engine, lanes, state
        self.world, self.cost, self.peak_tflops = engine.world, cost, peak_tflops
        self.stop, self.told = stop, False
        self.teacher: Teacher | None = None
        self.saved_step = state.progress.step
        self.metric_log: MetricLog | None = None
        self.sample_log: SampleLog | None = None
        with together(self.world):
            if self.world.first:
                cut_sample_logs(run, state.progress.step)
                total = sum(stage.samples for stage in cfg.stages)
                progress = state.progress
                self.metric_log = MetricLog(
                    run, cfg.logging, step=progress.step, samples=progress.samples, total_samples=total
                )
        if cfg.data.log_samples:
            self.sample_log = SampleLog(run, self.world.rank)

    def train(self) -> None:
        while not self.told and not self.state.progress.finished(self.cfg.stages):
            self._train_stage(self.cfg.stages[self.state.progress.stage])
        if self.saved_step != self.state.progress.step:
            self._save()
        with together(self.world, ask=lambda: self.stop.requested) as vote:
            pass  # what follows training takes its time too
        self.told |= vote.yes
        if self.told:
            preemption.ignore()  # launchers end the other ranks when the first one is gone
            if self.world.first:
                logger.info("told to leave: step %d is saved", self.saved_step)

    def close(self) -> None:
        for log in (self.metric_log, self.sample_log):
            if log is not None:
                log.close()

    def _train_stage(self, stage: StageConfig) -> None:
        number = self.state.progress.stage
        self._prepare_teacher()
        with self._loader(stage) as loader:
            while self.state.progress.stage == number:
                start = time.perf_counter()
                with together(self.world, ask=lambda: self.stop.requested) as vote:
                    batches = next(loader)
                    waited = time.perf_counter() - start
                if vote.yes:
                    self.told = True
                    return
                self._step(stage, batches, start, waited)
                if self.state.progress.step % self.cfg.checkpoint.every_steps == 0:
                    self._save()

    def _prepare_teacher(self) -> None:
        """Have it while this stage or a later one distills, and no longer."""
        config = self.cfg.objective.teacher
        if config is None or not distills_later(self.cfg.stages, self.state.progress):
            self.teacher = None
        elif self.teacher is None:
            merge = self.engine.module.vision.config.spatial_merge_size
            # Partitioning talks to the other ranks, which `together` does not allow: there a failure ends by time-out.
            with nullcontext() if config.partitioned else together(self.world):
                self.teacher = build_teacher(config, merge=merge, device=self.world.device)

    @contextmanager
    def _loader(self, stage: StageConfig) -> Iterator[PackLoader]:
        progress = self.state.progress
        first = progress.step - progress.step_in_stage
        with together(self.world):
            loader = PackLoader(
                self.cfg.data.sources,
                data=self.cfg.data,
                stage=stage,
                lanes_of_rank=self.lanes,
                lanes=self.cfg.data.lanes,
                seed=self.cfg.seed,
                modality_of=lambda step: modality_at(stage.video_ratio, step - first),
                tokenizer=self.run / TOKENIZER,
                context_length=self.cfg.model.text.context_length,
                cost=self.cost,
                cursors=self._cursors() if self.state.cursors else None,
                first_step=progress.step,
            )
        with loader:
            yield loader

    def _step(self, stage: StageConfig, batches: list[PackedBatch], start: float, waited: float) -> None:
        state, progress = self.state, self.state.progress
        lr = lr_at(stage, progress.samples_in_stage)
        distill_weight = weight_at(stage.distill, progress.samples_in_stage, stage.samples)
        result = train_step(
            self.engine,
            batches,
            lr=lr,
            objective=self.cfg.objective,
            teacher=self.teacher,
            distill_weight=distill_weight,
        )
        seconds = time.perf_counter() - start
        numbers = rank_numbers(
            batches, cost=self.cost, token_budget=stage.token_budget, step_s=seconds, data_wait_s=waited
        )
        joined = join_ranks(numbers, self.world)
        state.progress = advance(
            progress,
            self.cfg.stages,
            samples=result.items,
            tokens=int(joined["tokens"]),
            bad_samples=int(joined["bad_samples"]),
        )
        state.cursors = {batch.lane: batch.stand for batch in batches}
        state.window.add(result, joined, batches[0].modality, distill_weight)
        state.seconds += joined["step_s"]
        if self.sample_log is not None:
            self.sample_log.write(state.progress.step, batches)
        if self.metric_log is not None:
            self.metric_log.advance(result.items)
        if state.progress.step % self.cfg.logging.every_steps == 0 or state.progress.finished(self.cfg.stages):
            self._log(stage, result, lr)

    def _log(self, stage: StageConfig, result: Any, lr: float) -> None:
        state = self.state
        line = state.window.line(
            state.progress, stage.name, result, lr=lr, peak_tflops=self.peak_tflops, ranks=self.world.size
        )
        if self.metric_log is not None:
            self.metric_log.write(line)
        state.last = line
        if not state.best or line["loss"] < state.best["loss"]:
            state.best = {"loss": line["loss"], "step": line["step"]}
        state.window = state.window.next()

    def _cursors(self) -> dict[int, dict[str, Any]]:
        """Of this rank's lanes, as JSON."""
        return {lane: self.state.cursors[lane].to_json() for lane in self.lanes}

    def _save(self) -> None:
        state = self.state
        content = state.to_dict() | {
            "fingerprint": config_fingerprint(self.cfg),
            "config": self.cfg.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        root = self.run / CHECKPOINTS
        save_checkpoint(self.engine, root, state.progress.step, content, self._cursors(), self.cfg.checkpoint.keep)
        self.saved_step = state.progress.step


@contextmanager
def _engine(cfg: RunConfig, run: Path, world: World) -> Iterator[Engine]:
    with together(world):
        compile_on_cpu(compiles(cfg.model))
        special = special_ids(load_tokenizer(run / TOKENIZER))
        teacher = cfg.objective.teacher
        model = build_contrastive(
            cfg.model,
            vocab_size=special.vocab_size,
            eos_id=special.eos_id,
            pad_id=special.pad_id,
            seed=cfg.seed,
            teacher_width=None if teacher is None else read_teacher(teacher).width,
        )
        content = json.loads((run / DEEPSPEED).read_text())
        ds_config = resolve_deepspeed(cfg, world.size, content, (str(run / CONFIG), str(run / DEEPSPEED)))
    engine = build_engine(model, cfg.optimizer, ds_config, world)
    try:
        yield engine
    finally:
        engine.close()


def _restore(cfg: RunConfig, run: Path, engine: Engine) -> State:
    """Puts the last checkpoint into `engine`; rank 0 says which one, shared disks do not all know at once."""
    name = None
    with together(engine.world):
        if engine.world.first and (folder := commit.latest(run / CHECKPOINTS)):
            name = folder.name
    name = gather_json(name, engine.world)[0]
    if name is None:
        return State()
    folder = run / CHECKPOINTS / name
    saved = load_checkpoint(engine, folder)
    changed = changed_result(check_config(saved.state["config"], str(folder)), cfg)
    if changed:
        raise CheckpointError(
            f"{folder} was written with another configuration ({', '.join(changed)} differ); restore "
            f"{run / CONFIG}, or start a new run under another name"
        )
    if engine.world.first:
        logger.info("resuming from %s", folder)
        if saved.state["threads"] != torch.get_num_threads():
            logger.warning(
                "%d threads now, %d when the checkpoint was written: results will follow to rounding, not bit for bit",
                torch.get_num_threads(),
                saved.state["threads"],
            )
    return State.of(saved)


def _peak_tflops(cfg: RunConfig, engine: Engine) -> float:
    """Of all ranks together; measured on all of them at once where the configuration does not say."""
    peak = cfg.logging.peak_tflops or measured_tflops(engine.world.device, engine.dtype)
    return gather_numbers([peak], engine.world).sum().item()


def _write_summary(cfg: RunConfig, run: Path, engine: Engine, state: State) -> None:
    """summary.json; what later steps put there stays."""
    content: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        content = json.loads((run / SUMMARY).read_text())
    progress = state.progress
    content |= {
        "name": cfg.name,
        "fingerprint": config_fingerprint(cfg),
        "completed": progress.finished(cfg.stages),
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "bad_samples": progress.bad_samples,
        "best": state.best,
        "last": state.last,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters()),
        "checkpoints": [folder.name for folder in commit.complete(run / CHECKPOINTS)],
        "ranks": engine.world.size,
        "threads_per_rank": torch.get_num_threads(),
        "device": str(engine.world.device.type),
        "machine": f"{platform.node()}, {platform.machine()}, {platform.system()} {platform.release()}",
        "versions": versions(),
    }
    content["seconds"] = content.get("seconds", {}) | {"training": round(state.seconds, 1)}
    (run / SUMMARY).write_text(json.dumps(content, indent=2) + "\n")
