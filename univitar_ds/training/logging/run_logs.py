"""The logs of a rank during training: metrics, events, keys of samples, images of packs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.errors import UserError, writing
from univitar_ds.geometry import Modality
from univitar_ds.run_lock import still_ours
from univitar_ds.training.distributed.process_group import World, all_ranks_or_none
from univitar_ds.training.logging.writers import EventLog, MetricLog, SampleLog, cut_sample_logs
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.feature_snapshot import FeatureSnapshot
from univitar_ds.viz.training_images import draw_pack

logger = logging.getLogger(__name__)


@dataclass
class ImageSchedule:
    """When a pack is drawn: one of each modality in every `every` steps; never if `every` is 0."""

    every: int
    start: int
    """The step after which the logs were opened."""
    drawn: dict[str, int] = field(default_factory=dict)
    """The step of the last image, by modality."""

    def due(self, step: int, modality: Modality) -> bool:
        """Whether no pack of this modality was drawn yet in the current `every` steps."""
        return self.every > 0 and step // self.every > self.drawn.get(modality, self.start) // self.every


class RunLogs:
    """The logs of one rank: all logs on rank 0, only the sample log on other ranks. The logs are closed until `open`.

    An error while writing a log is not raised immediately, since other ranks would wait for this rank. It is kept
    until all ranks call `raise_unwritten` in `all_ranks_or_none`. An error that passes by itself is not kept:
    the log tries again later (`KeptLog`).
    """

    def __init__(self, cfg: RunConfig, run: Path, world: World) -> None:
        self.unwritten: Exception | None = None
        self._cfg, self._run, self._world = cfg, run, world
        self._events: EventLog | None = None
        self._metrics: MetricLog | None = None
        self._samples: SampleLog | None = None
        self._schedule: ImageSchedule | None = None

    def open(self, progress: Progress, events: Sequence[dict[str, Any]], keep_as: str | None = None) -> None:
        """Opens the logs after the step of `progress`, and removes later lines from existing files. All ranks call it.

        Args: keep_as: prefix of the files to which later lines of the sample logs are moved; None: they are removed.
        Raises: StorageError or LockLost if a log cannot be written, or could not be written earlier.
        """
        cfg = self._cfg
        with all_ranks_or_none(self._world), writing(self._run):
            self.raise_unwritten()
            if self._world.is_main:
                still_ours(self._run)
                cut_sample_logs(self._run, progress.step, keep_as=keep_as)
                self._events = EventLog(self._run)
                self._events.write(events)
                self._metrics = MetricLog(cfg, self._run, progress)
                if cfg.logging.tensorboard:
                    self._schedule = ImageSchedule(cfg.logging.images_every_steps, progress.step)
            if cfg.data.log_samples:
                self._samples = SampleLog(self._run, self._world.rank)

    def close(self) -> None:
        """Closes the logs; can be called again. An error while closing is raised by `raise_unwritten`."""
        logs = (self._events, self._metrics, self._samples)
        self._events = self._metrics = self._samples = self._schedule = None
        with ExitStack() as closing:
            for log in logs:
                if log is not None:
                    closing.callback(self._attempt, log.close)

    def raise_unwritten(self) -> None:
        """Raises the first error while writing a log, if any. Must be called within `all_ranks_or_none`."""
        if self.unwritten is not None:
            raise self.unwritten

    def write_event(self, events: Sequence[dict[str, Any]]) -> None:
        """Writes the last of `events`. They are all events of the run, since events.jsonl is rewritten as a whole."""
        if self._metrics is not None:
            self._write(lambda: self._events.write(events))
            self._write(lambda: self._metrics.mark(events[-1]))

    def write_samples(self, step: int, batches: Sequence[PackedBatch]) -> None:
        """Writes the keys of the samples of a step."""
        if self._samples is not None:
            self._write(lambda: self._samples.write(step, batches))

    def advance(self, progress: Progress, stage: int, loss: float) -> None:
        """Shows the progress after a step. Args: stage: index of the step's stage; loss: of the step."""
        if self._metrics is not None:
            self._metrics.advance(progress, stage, loss)

    def write_metrics(self, line: dict[str, Any]) -> None:
        """Writes the result of `Window.line`."""
        if self._metrics is not None:
            self._write(self._events.flush)
            self._write(lambda: self._metrics.write(line))

    def write_evaluation(self, line: dict[str, Any], text: str) -> None:
        """Writes the figures of an evaluation. Args: text: the message for the log."""
        if self._metrics is not None:
            self._write(lambda: self._metrics.write_evaluation(line, text))

    def leave_out(self, seconds: float) -> None:
        """Excludes a time without steps from the shown speed and from the estimated end."""
        if self._metrics is not None:
            self._metrics.leave_out(seconds)

    def draws(self, step: int, modality: Modality) -> bool:
        """Returns whether a pack of this step should be drawn."""
        return self._schedule is not None and self._schedule.due(step, modality)

    def draw(self, step: int, batch: PackedBatch, snapshot: FeatureSnapshot, merge: int) -> None:
        """Writes an image of a pack to TensorBoard. Called for steps for which `draws` returns True."""
        try:
            title = f"Run {self._run.name}, step {step}"
            sheet = draw_pack(batch, snapshot.items, snapshot.tokens, snapshot.kept, merge, title=title)
            self._write(lambda: self._metrics.image(f"pack_{batch.modality}", sheet, step))
        except Exception as error:  # only rank 0 draws, and an image must not end the run
            logger.warning("no images of packs from step %d on: %s: %s", step, type(error).__name__, error)
            self._schedule = None
            return
        self._schedule.drawn[batch.modality] = step

    def _write(self, write: Callable[[], None]) -> None:
        if self.unwritten is None:
            self._attempt(write)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            with writing(self._run):
                write()
        except (OSError, UserError) as error:
            self.unwritten = self.unwritten or error
