"""The training loop of one rank."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from univitar_ds import plugins, startup
from univitar_ds.classes import ClassList
from univitar_ds.config.load import config_fingerprint
from univitar_ds.config.run_folder import CHECKPOINTS, CLASSES, TOKENIZER
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.data.shards.sources import SourceShard, content_of, validate_sources
from univitar_ds.data.shared_listing import check_reachable, listing_of, shards_of
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import UserError, first_line
from univitar_ds.formats.checkpoint.store import store_of
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.flops import cost_coefficients
from univitar_ds.model.teacher.teacher import Teacher, build_teacher
from univitar_ds.plugins import RunInfo, StepInfo
from univitar_ds.training.assembly import build_training
from univitar_ds.training.callbacks import Callbacks, load_on_all_ranks
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.protocol import Retention, Target
from univitar_ds.training.checkpoint.s3_folder import S3Folder
from univitar_ds.training.checkpoint.saves import Saves
from univitar_ds.training.checkpoint.sharded import copied_state
from univitar_ds.training.checkpoint.staging import Staging
from univitar_ds.training.distributed import preemption
from univitar_ds.training.distributed.alarm import ending_together
from univitar_ds.training.distributed.groups import groups_of
from univitar_ds.training.distributed.preemption import NEVER, SAVED, Stop
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none, broadcast_json, gather_json
from univitar_ds.training.engine.determinism import explained, set_deterministic
from univitar_ds.training.engine.engine import versions
from univitar_ds.training.engine.optim import trained_parts
from univitar_ds.training.logging.metrics import exchange_with_times, local_metrics, memory_gb, part_norms
from univitar_ds.training.logging.run_logs import RunLogs
from univitar_ds.training.logging.writers import SKIPPED
from univitar_ds.training.mid_evaluation import Evaluate, MidEvaluation
from univitar_ds.training.step.classification import classification_step
from univitar_ds.training.step.counts import StepCounts, numbers_of, over_ranks, own_counts
from univitar_ds.training.step.curriculum import Progress, advance, distills_later, lr_at, modality_at, weight_at
from univitar_ds.training.step.feature_snapshot import capture_features
from univitar_ds.training.step.guard import named_samples, spike_reason
from univitar_ds.training.step.kept_packs import KeptPacks
from univitar_ds.training.step.pack_share import share_of, whole_of
from univitar_ds.training.step.peak_flops import find_peak
from univitar_ds.training.step.recomputation import recomputation_of
from univitar_ds.training.step.train_step import (
    DivergedError,
    NotFiniteError,
    StepResult,
    StepSettings,
    encoded_before_first,
    train_step,
)
from univitar_ds.training.step.upload import CudaPageLock, release_pixels
from univitar_ds.training.summary import write_summary
from univitar_ds.training.watch.phases import CHECKPOINT, DATA, StepClock, phase
from univitar_ds.training.watch.slow_ranks import SlowRanks, per_step, times_over_ranks
from univitar_ds.training.watch.watching import watching

logger = logging.getLogger(__name__)


def train(
    cfg: RunConfig,
    run: Path,
    world: World,
    stop: Stop = NEVER,
    evaluate: Evaluate | None = None,
) -> bool:
    """Trains a run to its end, from the last checkpoint if the run has one. Every rank of `world` calls it.

    Args:
        run: the run's folder, which contains deepspeed.json and tokenizer.json and receives all output.
        stop: if a rank is asked to stop, all ranks save and end after the same step.
        evaluate: evaluates the weights while the run trains; None: no evaluation, also with `evaluation.every_samples`.
    Returns: whether all stages are done and no rank was asked to stop; the same on all ranks.
    Raises: the error that ends the run early, a UserError if the user can correct it; PeerFailure on ranks without an
        error of their own. After an error that other ranks do not notice, these may end within seconds without raising,
        see `alarm`.
    """
    with ending_together(world), watching(cfg, run, world) as clock:
        return _train(cfg, run, world, stop, clock, evaluate)


def _train(cfg: RunConfig, run: Path, world: World, stop: Stop, clock: StepClock, evaluate: Evaluate | None) -> bool:
    set_deterministic(cfg.deterministic)
    load_on_all_ranks(cfg.plugins, world)
    trainer = _Trainer(cfg, run, world, stop, clock, evaluate)
    with closed_after(trainer.close):
        trainer.start()
        with stop.deferred(), enough_memory(trainer.memory_remedy), trainer.saves.settled():
            trainer.train()
        if world.is_main:
            write_summary(cfg, run, trainer.engine, trainer.state)
        return not trainer.leaving


def _step_info(
    progress: Progress, stage: str, modality: str, result: StepResult, lr: float, reduced: dict[str, float]
) -> StepInfo:
    return StepInfo(
        step=progress.step,
        stage=stage,
        modality=modality,
        samples=progress.samples,
        tokens=progress.tokens,
        items=result.items,
        loss=result.loss,
        losses=dict(result.losses),
        grad_norm=result.grad_norm,
        lr=lr,
        logit_scale=result.logit_scale,
        logit_bias=result.logit_bias,
        seconds=reduced["step_s"],
    )


class OutOfMemory(UserError):
    """Raised if the memory of a rank's GPU or machine is too small."""


@contextmanager
def enough_memory(remedy: Callable[[], str]) -> Iterator[None]:
    """Raises OutOfMemory with a remedy if the body runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"out of memory on {remedy()}. {first_line(error)}") from error


@contextmanager
def closed_after(close: Callable[[], None]) -> Iterator[None]:
    """Calls `close` after the body. If the body raises, that error is raised and an error of `close` is only logged."""
    try:
        yield
    except BaseException:
        try:
            close()
        except Exception:
            logger.warning("closing failed after the error that ends the run", exc_info=True)
        raise
    close()


class _Trainer:
    """One process of a run: trains the stages, logs, saves, and rolls back after a bad step."""

    def __init__(
        self, cfg: RunConfig, run: Path, world: World, stop: Stop, clock: StepClock, evaluate: Evaluate | None
    ) -> None:
        self.cfg, self.run, self.world, self.clock = cfg, run, world, clock
        self.slow_ranks = SlowRanks()
        self.times: dict[str, float] = {}
        self.tabled = -1
        """Index of the last stage whose memory was logged."""
        self.groups = groups_of(cfg, world)
        self.lanes = self.groups.lanes(cfg)
        self.stop, self.leaving = stop, False
        self.teacher: Teacher | None = None
        self.kept = KeptPacks(1, len(self.lanes), world)
        self.classes = ClassList.read(run / CLASSES) if cfg.objective.classifies else None
        self.logs = RunLogs(cfg, run, world)
        self.callbacks = Callbacks(world)
        self.evaluation = MidEvaluation(cfg, world, evaluate, self.logs, clock, stop)
        self.engine, self.state = build_training(cfg, run, world)
        startup.phase("measuring the processor's peak FLOP/s")
        self.cost = cost_coefficients(self.engine.module.vision.config)
        self.peak = find_peak(cfg.logging.peak_tflops, self.engine.dtype, world)
        self.saved_step = self.state.progress.step
        self.store = store_of(cfg)
        self.saves = Saves(world, self._saved, asynchronous=cfg.checkpoint.asynchronous, failed=self._not_saved)
        self.staging = Staging(world)

    def start(self) -> None:
        """Opens the logs; `close` must be called afterwards."""
        self.logs.open(self.state.progress, self.state.events)
        progress = self.state.progress
        begun = sum(event["event"] == "stage" for event in self.state.events)
        if begun <= progress.stage < len(self.cfg.stages):  # a new run, or a finished one with a further stage
            self._note_stage()
        if self.cfg.plugins:
            config = self.cfg.model_dump(mode="json")
            with all_ranks_or_none(self.world):
                self.callbacks.call(
                    "on_start", RunInfo(self.cfg.name, self.run, progress.step, self.world.size, config)
                )
                self.callbacks.raise_failed()

    def train(self) -> None:
        """Trains until all stages are done or a rank is asked to stop, and saves the last step."""
        while not self.leaving and not self.state.progress.finished(self.cfg.stages):
            self._train_stage(self.cfg.stages[self.state.progress.stage])
        announced = self.leaving
        if announced and self.world.is_main:
            step = self.state.progress.step
            logger.info(
                "asked to stop: saving step %d, then exiting with code %d; a second signal exits immediately%s",
                step,
                SAVED,
                self.stop.remedy,
            )
        self._save()
        with self.clock.section(CHECKPOINT):
            self.saves.finish()
        self.logs.close()
        # Ranks vote once more, since a request may have come while they saved.
        with all_ranks_or_none(self.world, ask=lambda: self.stop.requested) as vote:
            self.logs.raise_unwritten()
            self.callbacks.raise_failed()
        self.leaving |= vote.yes
        if self.leaving:
            preemption.ignore()  # launchers end the other ranks after the first rank has ended
            if self.world.is_main and not announced:
                logger.info(
                    "asked to stop: step %d, the last one, is saved; exiting with code %d%s",
                    self.saved_step,
                    SAVED,
                    self.stop.remedy,
                )

    def close(self) -> None:
        """Closes the logs and the engine. Can be called again, and after a failed rollback or stage transition."""
        try:
            self.logs.close()
        finally:
            self.engine.close()

    def memory_remedy(self) -> str:
        """Returns text for an error message: where the memory ran out, the settings that lower its use, and a table of
        its use."""
        progress = self.state.progress
        stage = self.cfg.stages[min(progress.stage, len(self.cfg.stages) - 1)]
        every = self.engine.module.vision.checkpoint_every
        recomputed = "" if every == 1 else f", recompute more blocks (checkpoint_every is {every}; 1: all)"
        return (
            f"rank {self.world.rank} on {platform.node()}, step {progress.step + 1}, stage {stage.name}: lower its "
            f"token_budget ({stage.token_budget}){recomputed}, or shard more (a DeepSpeed JSON with ZeRO 3 or offload)"
            f"; {self._memory_table()}"
        )

    def _memory_table(self) -> str:
        """Returns the peak memory of this rank by part of the training state, as text."""
        parts = self.engine.memory_by_part(None if self.teacher is None else self.teacher.tower.model)
        rest = memory_gb() - sum(parts.values()) / 1e9
        held = [f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size]
        what = "activations, buckets" if self.world.device.type == "cuda" else "activations, Python, libraries"
        return f"memory of rank {self.world.rank} at its peak in GB: {', '.join(held)}, the rest ({what}) {rest:.2f}"

    def _train_stage(self, stage: StageConfig) -> None:
        """Trains until the stage ends, a rank is asked to stop, or a step is undone."""
        number = self.state.progress.stage
        self.clock.start()
        startup.phase("opening the sources" if self.cfg.objective.teacher is None else "building the teacher")
        self._prepare_teacher()
        self.engine.module.vision.checkpoint_every = recomputation_of(self.cfg, stage, self.engine)
        wanted = self.cfg.objective.grad_cache_keep if self.classes is None else 1
        self.kept = KeptPacks(wanted, len(self.lanes), self.world)
        self._evaluate()  # if a stop request has interrupted an evaluation
        with self._loader(stage) as loader:
            while self.state.progress.stage == number:
                start = time.perf_counter()
                self.clock.begin_step(self.state.progress.step + 1)
                startup.phase("reading and decoding the first packs")
                batches: list[PackedBatch] = []
                settings = self._settings(stage)
                teacher = self.teacher if settings.distill_weight else None
                agreed = all_ranks_or_none(
                    self.world,
                    lambda: self.stop.requested,
                    partial(own_counts, batches, settings.dropping, teacher, self.classes),
                    numbers_of(len(self.lanes), distills=teacher is not None),
                    self.saves.ready,
                )
                with phase(DATA), agreed as vote:
                    self.logs.raise_unwritten()
                    self.callbacks.raise_failed()
                    self.saves.raise_failed()
                    batches += [share_of(batch, self.groups.sequence) for batch in next(loader)]
                    waited = time.perf_counter() - start
                startup.phase("computing the first step")
                if vote.ready:
                    self.saves.advance()
                if vote.yes:
                    self.leaving = True
                    return
                if trouble := self._step(
                    batches, settings, over_ranks(self.groups.of_data(vote.counts)), start, waited
                ):
                    self._roll_back(trouble, batches)
                    return
                release_pixels(self.world.device)  # the step has read the gradient's norm, so the copies are done
                del batches  # frees the shared slots for the batches of the next step
                self.clock.end_step()
                best = self._evaluate()  # before the step is saved, so that a resumed run does not repeat it
                if best or self.state.progress.step % self.cfg.checkpoint.every_steps == 0:
                    self._save()
        if not self.state.progress.finished(self.cfg.stages):
            self._stage_transition()

    def _evaluate(self) -> bool:
        """Evaluates the weights if an evaluation is due. Returns whether the result is the best so far."""
        return self.evaluation.due(self.state) and self.evaluation.run(self.engine, self.state, self._note)

    def _stage_transition(self) -> None:
        """Saves a checkpoint and continues with the next stage. If the next stage trains other parts, the engine is
        built again with another optimizer.

        With this checkpoint a rollback never returns to the previous stage.
        """
        self._save()
        stage = self.cfg.stages[self.state.progress.stage]
        if set(trained_parts(self.cfg, stage)) != self.state.began.keys():
            self._rebuild()

    def _note_stage(self) -> None:
        """Records that the stage of the next step begins."""
        progress = self.state.progress
        stage = self.cfg.stages[progress.stage]
        event = {"step": progress.step, "event": "stage", "stage": stage.name, "samples_seen": progress.samples}
        self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        self.state.events.append(event)
        self.logs.write_event(self.state.events)

    def _rebuild(self) -> None:
        with self.clock.section(CHECKPOINT):
            self.saves.finish()
        self.clock.start()
        self.engine.close()  # before the next engine is built: two engines would not fit into memory
        self.engine, self.state = build_training(self.cfg, self.run, self.world)

    def _roll_back(self, trouble: str, batches: list[PackedBatch]) -> None:
        """Returns to the last checkpoint, and skips the data that were read since. All ranks call it at the same step.

        Raises: DivergedError if the run has already had `guard.max_rollbacks` rollbacks.
        """
        step, max_rollbacks = self.state.progress.step + 1, self.cfg.guard.max_rollbacks
        if self.state.rollbacks >= max_rollbacks:
            raise DivergedError(
                f"step {step}: {trouble}; the run was rolled back {self.state.rollbacks} times, guard.max_rollbacks is "
                f"{max_rollbacks}. Its last checkpoint stays: resume with a higher limit, or start a new run with a "
                "lower lr or optimizer.clip_norm"
            )
        events, seconds = self.state.events, self.state.seconds
        self.logs.close()
        self._rebuild()
        last_saved = self.state.progress.step
        self.state.cursors = {batch.lane: batch.cursor for batch in batches}
        self.state.events, self.state.seconds, self.saved_step = events, seconds, last_saved
        self.state.history.skipped = 0  # the checkpoint may be from between skipped steps
        self.logs.open(self.state.progress, events, keep_as=SKIPPED)
        self._note({"step": last_saved, "event": "rollback", "undone_step": step, "reason": trouble})

    def _prepare_teacher(self) -> None:
        """Builds the teacher if this stage or a later stage distills; frees the teacher otherwise."""
        config = self.cfg.objective.teacher
        if config is None or not distills_later(self.cfg.stages, self.state.progress):
            self.teacher = None
        elif self.teacher is None:
            merge = self.engine.module.vision.config.spatial_merge_size
            # Partitioning is a collective, which `all_ranks_or_none` does not allow; after a failure ranks time out.
            with nullcontext() if config.partitioned else all_ranks_or_none(self.world):
                self.teacher = build_teacher(config, merge=merge, device=self.world.device)

    @contextmanager
    def _loader(self, stage: StageConfig) -> Iterator[PackLoader]:
        progress = self.state.progress
        first = progress.step - progress.step_in_stage
        shards, content = self._shards(stage)
        lanes = LaneSet(
            owned=self.lanes,
            count=self.cfg.data.lanes,
            seed=self.cfg.seed,
            cursors=self.state.cursors or None,
            first_step=progress.step,
            content=content,
            shards=shards,
            warns=self.groups.first_reader,
        )
        with all_ranks_or_none(self.world):
            loader = PackLoader(
                self.cfg.loaded_data,
                stage,
                lanes,
                modality_of=lambda step: modality_at(stage.video_ratio, step - first),
                tokenizer=self.run / TOKENIZER if self.classes is None else None,
                context_length=self.cfg.model.text.context_length,
                cost=self.cost,
                prefetch_full_step=self.world.device.type == "cuda",
                page_lock=CudaPageLock() if self.world.device.type == "cuda" else None,
            )
        with loader:
            yield loader

    def _shards(self, stage: StageConfig) -> tuple[list[SourceShard] | None, str | None]:
        """Returns the shards of the sources and the fingerprint of their content; (None, None) on a single rank.

        Only rank 0 lists the sources and reads content, since a store would throttle hundreds of ranks. Every other
        rank checks that it can read one shard of each source.
        """
        if self.world.size == 1:
            return None, None
        settings, sources = StorageSettings.of(self.cfg.data), self.cfg.data.sources
        listing, content, shards = None, "", []
        with all_ranks_or_none(self.world):
            if self.world.is_main:
                shards = validate_sources(sources, [stage], settings)
                listing, content = listing_of(shards), content_of(shards)
        listing, content = broadcast_json([listing, content], self.world)
        with all_ranks_or_none(self.world):
            if not self.world.is_main:
                shards = shards_of(listing, sources, settings)
                check_reachable(shards, self.world.rank)
        return shards, content

    def _step(
        self, batches: list[PackedBatch], settings: StepSettings, counts: StepCounts, start: float, waited: float
    ) -> str | None:
        """Updates the parameters once. Returns the reason if the step must be undone, else None.

        Either all ranks return a reason or all return None."""
        state, progress = self.state, self.state.progress
        modality = batches[0].modality
        drawn_batch = batches[0] if self.logs.draws(progress.step + 1, modality) else None
        before = 0 if self.classes is not None else encoded_before_first(len(batches))
        features = capture_features(self.engine.module.vision, drawn_batch, before=before)
        reduced: dict[str, float] = {}

        def gather(numbers: list[float]) -> torch.Tensor:
            metrics, table = self._reduced(batches, settings, start, waited, numbers, timed=settings.read_gradient)
            reduced.update(metrics)
            return table

        try:
            with explained(self.cfg.deterministic), self.kept.measured(), features as snapshots:
                how, more = (self.engine, batches, settings, self.cfg.objective), (self.teacher, counts, gather)
                if self.classes is None:
                    result = train_step(*how, *more)
                else:
                    result = classification_step(*how, self.classes, *more)
        except NotFiniteError as error:
            return self._skip(batches, settings, error, start, waited)
        except DivergedError as error:
            return str(error)
        trouble = spike_reason(state.history, progress.stage, modality, result.loss, result.grad_norm, self.cfg.guard)
        if trouble is not None:
            return trouble
        self._advance(batches, settings, result, reduced)
        if snapshots:
            merge = self.engine.module.vision.config.spatial_merge_size
            self.logs.draw(state.progress.step, batches[0], snapshots[0], merge)
        return None

    def _reduced(
        self,
        batches: list[PackedBatch],
        settings: StepSettings,
        start: float,
        waited: float,
        others: Sequence[float] = (),
        *,
        timed: bool = False,
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Returns the metrics of a step over all ranks, and `others` of every rank. All ranks call it.

        Args: timed: whether to exchange the times of the phases of the previous steps."""
        numbers = local_metrics(
            batches,
            cost=self.cost,
            token_budget=self.cfg.stages[self.state.progress.stage].token_budget,
            step_s=time.perf_counter() - start,
            data_wait_s=waited,
            dropping=settings.dropping,
            squares=self.engine.gradient_squares if settings.read_gradient else None,
        )
        times = self.clock.take() if timed else []
        reduced, table, taken = exchange_with_times(numbers, others, times, self.world, equal=self.groups.tensor.size)
        self.times = {}
        if timed and (seconds := per_step(taken)) is not None:
            self.times = times_over_ranks(seconds)
            event = self.slow_ranks.event(self.state.progress.step + 1, seconds, float(taken[0, 0]))
            if event is not None:  # on all ranks
                self._note(event | {"host": gather_json(platform.node(), self.world)[event["rank"]]})
        return reduced, table

    def _skip(
        self, batches: list[PackedBatch], settings: StepSettings, error: NotFiniteError, start: float, waited: float
    ) -> str | None:
        """Counts a step whose update was skipped: its data count as seen, the parameters are unchanged. All ranks call
        it.

        Returns: a reason to undo the step if too many updates in a row were skipped, else None."""
        state, limit = self.state, self.cfg.guard.max_skipped_in_a_row
        if state.history.skipped >= limit:
            return f"{error}; {limit} updates before it were skipped (limit: guard.max_skipped_in_a_row)"
        startup.done()
        state.history.skipped += 1
        reduced, _ = self._reduced(batches, settings, start, waited)
        stage = state.progress.stage
        state.window.add_skipped(error.items, reduced, batches[0].modality)
        event = {"step": state.progress.step + 1, "event": "skipped", "reason": str(error), "samples": error.items}
        self._count(batches, error.items, reduced, event | named_samples(batches, error.suspects, self.groups.data))
        self.logs.advance(state.progress, stage, math.nan)
        return None

    def _settings(self, stage: StageConfig) -> StepSettings:
        """Returns the settings of the next step, from the schedules of the stage."""
        progress = self.state.progress
        done = progress.samples_in_stage
        return StepSettings(
            lr=lr_at(stage, done),
            contrastive_weight=weight_at(stage.contrastive, done, stage.samples),
            distill_weight=weight_at(stage.distill, done, stage.samples),
            dropping=DropConfig.of(stage, self.engine.module.vision.config, seed=self.cfg.seed, step=progress.step),
            read_gradient=(progress.step + 1) % self.cfg.logging.every_steps == 0,
            keep=self.kept.count,
        )

    def _advance(
        self, batches: list[PackedBatch], settings: StepSettings, result: StepResult, reduced: dict[str, float]
    ) -> None:
        """Adds a good step to the state and the logs. `reduced` are the metrics of the step over all ranks."""
        state, progress, modality = self.state, self.state.progress, batches[0].modality
        startup.done()
        state.history.add(progress.stage, modality, result.loss, result.grad_norm, self.cfg.guard.window_steps)
        self._count(batches, result.items, reduced)
        loss = "contrastive" if self.classes is None else "classification"
        weights = {loss: settings.contrastive_weight, "distill": settings.distill_weight}
        state.window.add(result, reduced, modality, weights)
        self.logs.advance(state.progress, progress.stage, result.loss)
        if settings.read_gradient or state.progress.finished(self.cfg.stages):
            further = part_norms(reduced) | self.times if settings.read_gradient else None
            self._log(progress.stage, result, settings.lr, further)
        if self.callbacks:
            stage = self.cfg.stages[progress.stage].name
            self.callbacks.call("on_step", _step_info(state.progress, stage, modality, result, settings.lr, reduced))

    def _count(
        self, batches: list[PackedBatch], items: int, reduced: dict[str, float], event: dict[str, Any] | None = None
    ) -> None:
        """Counts a step and its data. Args: items: over all ranks; event: to be recorded for the step."""
        state, before = self.state, self.state.progress
        state.progress = advance(
            before,
            self.cfg.stages,
            samples=items,
            tokens=int(reduced["tokens"]),
            bad_samples=int(reduced["bad_samples"]),
        )
        if event is not None:
            self._note(event)
        if state.progress.stage != before.stage and not state.progress.finished(self.cfg.stages):
            self._note_stage()
        state.cursors = {batch.lane: batch.cursor for batch in batches}
        state.seconds += reduced["step_s"]
        if self.groups.first_reader:
            self.logs.write_samples(state.progress.step, [whole_of(batch) for batch in batches])

    def _log(self, stage: int, result: StepResult, lr: float, further: dict[str, float] | None) -> None:
        state = self.state
        line = state.window.line(
            state.progress,
            (stage, self.cfg.stages[stage].name),
            result,
            lr=lr,
            peak=self.peak,
            ranks=self.world.size,
            guarded=state.guarded,
            further=further,
        )
        self.logs.write_metrics(line)
        if self.world.is_main and stage != self.tabled:
            logger.info("%s", self._memory_table())
            self.tabled = stage
        state.last = line
        if not state.best or line["loss"] < state.best["loss"]:
            state.best = {"loss": line["loss"], "step": line["step"]}
        state.window = state.window.next()

    def _save(self) -> None:
        """Saves a checkpoint unless this step is already saved."""
        state = self.state
        if self.saved_step == state.progress.step:
            return
        content = state.to_dict() | {
            "fingerprint": config_fingerprint(self.cfg),
            "config": self.cfg.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "model": self.engine.module.description(),
        }
        if self.cfg.plugins:
            content["plugins"] = [plugin.described() for plugin in plugins.active()]
        self.engine.agree()
        cursors = {lane: state.cursors[lane].to_json() for lane in self.lanes}
        best = state.best_evaluation.get("step")
        retention = Retention(self.cfg.checkpoint.keep, self.cfg.checkpoint.keep_every_steps, best)
        target: Target = (
            LocalFolder(self.run / CHECKPOINTS, state.progress.step, retention)
            if self.store is None
            else S3Folder(self.run, self.store, state.progress.step, retention)
        )
        with self.clock.section(CHECKPOINT):
            self.saves.begin(
                target,
                state.progress.step,
                lambda: copied_state(self.engine, content, cursors, self.staging, shares_files=target.shares_files),
            )
        self.saved_step = state.progress.step

    def _not_saved(self, event: dict[str, Any]) -> None:
        self._note({"step": self.state.progress.step} | event)

    def _saved(self, target: Target) -> None:
        self.callbacks.call("on_checkpoint", target.place)
