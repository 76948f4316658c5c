"""The log files of a run, and the display of its progress."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.load import dumped
from univitar_ds.config.run_folder import EVENTS, METRICS
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.run_lock import still_ours
from univitar_ds.screen import has_terminal
from univitar_ds.training.logging.board import EVALUATED, Board, code_block, numbers, results
from univitar_ds.training.logging.kept_log import JsonLines, KeptLog
from univitar_ds.training.logging.progress import Pace, ProgressLine, steps_text
from univitar_ds.training.logging.trackers import open_trackers, without_credentials
from univitar_ds.training.step.curriculum import Progress

logger = logging.getLogger(__name__)

BLOCK = 1 << 16
"""Size in bytes of the blocks in which a file is read from its end."""
SKIPPED = "skipped"
"""Prefix of the sample logs with the steps that a rollback has undone."""


class MetricLog:
    """metrics.jsonl, TensorBoard, trackers, and the status line or log lines; only on rank 0."""

    def __init__(self, cfg: RunConfig, run: Path, progress: Progress) -> None:
        """Opens the files after `progress`, and removes later lines, which an earlier launch or a rollback left behind.

        Raises: OSError if a file cannot be written."""
        self._every = cfg.logging.every_steps
        self._stages, self._pace = cfg.stages, Pace(cfg.stages, progress)
        self._first = True
        """Whether no step has been done since the files were opened."""
        with ExitStack() as opened:
            _cut_after(run / METRICS, progress.step)
            self._lines = JsonLines(run / METRICS, ours(run))
            opened.callback(self._lines.close)
            self._evaluated = _last_evaluated(run / METRICS)
            self._board = None
            if cfg.logging.tensorboard:
                self._board = Board(run, progress.step, ours(run))
                opened.callback(self._board.close)
                self._board.text(
                    "config", code_block(without_credentials(dumped(cfg.model_dump(mode="json")))), progress.step
                )
            self._trackers = open_trackers(cfg, run)
            opened.pop_all()
        self._line = ProgressLine(cfg.stages) if has_terminal() else None

    def advance(self, progress: Progress, stage: int, loss: float) -> None:
        """Shows the progress after a step. Args: stage: index of the step's stage; loss: of the step."""
        self._pace.add(progress)
        if self._line is not None:
            self._line.draw(stage, progress.step, loss, self._pace.outlook())
        elif self._first and self._every > 1:
            logger.info("step %d is done; metrics follow every %d steps", progress.step, self._every)
        self._first = False

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line to metrics.jsonl (with all digits), TensorBoard, trackers, and the status line or the log."""
        self._lines.append(json.dumps(line))
        if self._board is not None:
            self._board.scalars(line)
        for tracker in self._trackers:
            tracker.log(numbers(line), line["step"])
        if self._line is not None:
            self._line.note(line)
            return
        outlook = self._pace.outlook()
        logger.info(
            "%s, %.1f %%, %s, %s %s, loss %.4f, lr %.2e, grad norm %.2f, %.1f samples/s, %s, fill %.0f %%, "
            "data wait %.0f %%",
            steps_text(line["step"], outlook),
            outlook.percent,
            outlook.eta,
            *(line[name] for name in ("stage", "modality", "loss", "lr", "grad_norm", "samples_per_s")),
            mfu_text(line),
            *(line[name] for name in ("fill_pct", "data_wait_pct")),
        )

    def write_evaluation(self, line: dict[str, Any], text: str) -> None:
        """Writes the figures of an evaluation to metrics.jsonl, TensorBoard and trackers, and `text` to the log.

        An evaluation that is repeated after a resume gets no second line in metrics.jsonl."""
        if line["step"] != self._evaluated:
            self._lines.append(json.dumps(line))
            self._evaluated = line["step"]
        values = {name: value for name, value in line.items() if name.startswith(f"{EVALUATED}/")}
        if self._board is not None:
            self._board.points(values, line["step"])
        for tracker in self._trackers:
            tracker.log(values, line["step"])
        logger.info("%s", text)

    def leave_out(self, seconds: float) -> None:
        """Excludes a time without steps from the estimates."""
        self._pace.leave_out(seconds)

    def mark(self, event: dict[str, Any]) -> None:
        """Writes an event as text to TensorBoard, and to the log."""
        detail = event_text(event)
        if self._board is not None:
            self._board.text("events", detail, event["step"])
        logger.log(logging.INFO if event["event"] == "stage" else logging.WARNING, "%s", detail)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Writes an image to TensorBoard."""
        self._board.image(name, image, step)

    def close(self) -> None:
        """Closes all files, also if closing one fails, as on a full disk. Can be called again."""
        with ExitStack() as closing:
            for tracker in self._trackers:
                closing.callback(tracker.close)
            if self._line is not None:
                closing.callback(self._line.close)
            if self._board is not None:
                closing.callback(self._board.close)
            closing.callback(self._lines.close)


def write_results(cfg: RunConfig, run: Path, figures: Sequence[Mapping[str, Any]], table: str, step: int) -> None:
    """Writes the results of the evaluation after training to TensorBoard and the trackers.

    Args: figures: those of evaluation.json; table: the same as text; step: of the evaluated checkpoint.
    Raises: OSError if a file cannot be written.
    """
    values = results(figures)
    with ExitStack() as closing:
        for tracker in open_trackers(cfg, run):
            closing.callback(tracker.close)
            tracker.log(values, step)
        if cfg.logging.tensorboard:
            board = Board(run, step, ours(run))
            closing.callback(board.close)
            board.points(values, step)
            board.text("eval/results", code_block(table), step)


class SampleLog:
    """samples-rank*.jsonl: the keys of the samples of each step, per lane of this rank."""

    def __init__(self, run: Path, rank: int) -> None:
        """Opens the file for appending. Raises: OSError."""
        self._lines = JsonLines(run / f"samples-rank{rank}.jsonl", ours(run))

    def write(self, step: int, batches: Sequence[PackedBatch]) -> None:
        """Writes a line for each pack of a step."""
        for batch in batches:
            line = {"step": step, "lane": batch.lane, "modality": batch.modality, "keys": batch.keys}
            self._lines.append(json.dumps(line))

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class EventLog(KeptLog):
    """events.jsonl: stages that began, skipped updates, rollbacks, slow ranks, failed evaluations and saves.

    The file is written as a whole with each event, so only the last content is kept while it cannot be written."""

    def __init__(self, run: Path) -> None:
        super().__init__(run / EVENTS, "events", ours(run))

    def write(self, events: Sequence[dict[str, Any]]) -> None:
        """Writes all events of the run. Raises: as `KeptLog.flush`."""
        text = "".join(json.dumps(event) + "\n" for event in events)
        self._kept.clear()
        self._bytes = 0
        self._add(text, len(text))

    def _put(self, entries: list[str]) -> None:
        replace_text(self.path, entries[-1])


def cut_sample_logs(run: Path, step: int, *, keep_as: str | None = None) -> None:
    """Removes the lines after `step` from the sample logs of all ranks.

    With `keep_as` the lines of `samples-rank0.jsonl` are appended to `<keep_as>-rank0.jsonl`, and so on.
    """
    for path in run.glob("samples-rank*.jsonl"):
        if keep_as is not None:
            with path.open("rb") as old, (run / path.name.replace("samples", keep_as, 1)).open("ab") as kept:
                old.seek(_end_of(path, step))
                kept.writelines(line for line in old if step < _step_of(line) < float("inf"))
        _cut_after(path, step)


def ours(run: Path) -> Callable[[], None]:
    """Returns a function that raises LockLost if another launch has taken over the run, and StorageError if that cannot
    be read."""
    return lambda: still_ours(run, recently=True)


def mfu_text(line: dict[str, Any]) -> str:
    """Returns the MFU of a line as text, with a note if the MFU is not reliable."""
    note = f" ({line['mfu_note']})" if "mfu_note" in line else ""
    return f"mfu {line['mfu_pct']:.0f} %{note}"


def event_text(event: dict[str, Any]) -> str:
    """Returns an entry of events.jsonl as a sentence."""
    if event["event"] == "rollback":
        return (
            f"step {event['undone_step']}: {event['reason']}; back to step {event['step']}, the data since are skipped"
        )
    if event["event"] == "skipped":
        named = [f"not finite: {', '.join(event['not_finite'])}"] if "not_finite" in event else []
        return "; ".join([f"step {event['step']}: {event['reason']}", "this update is skipped", *named])
    if event["event"] == "evaluation_failed":
        rank, reason = event["rank"], event["reason"].removesuffix(".")
        return f"step {event['step']}: rank {rank} could not evaluate: {reason}; the training continues"
    if event["event"] == "save_failed":
        return _save_text(event)
    if event["event"] == "slow_rank":
        return (
            f"step {event['step']}: rank {event['rank']} on {event['host']} slows the others down, mostly by "
            f"{event['phase']}: {event['phase_s']:.3f} s a step where the median of the others is "
            f"{event['others_s']:.3f} s"
        )
    return f"stage {event['stage']} begins after step {event['step']}, {event['samples_seen']} samples"


def _save_text(event: dict[str, Any]) -> str:
    """Returns a failed save as a sentence."""
    rank, saved, reason = event["rank"], event["checkpoint"], event["reason"].removesuffix(".")
    if event["complete"]:
        return f"the checkpoint of step {saved} is complete, but outdated ones were not removed: {reason}"
    return (
        f"step {event['step']}: rank {rank} could not save the checkpoint of step {saved}: {reason}; the training "
        f"continues, the earlier checkpoints stay, and this one is written again in {event['again_after_s']:g} s"
    )


def _cut_after(path: Path, step: int) -> None:
    """Removes the lines after `step` from a file of JSON lines, and a line truncated by a crash."""
    if path.exists():
        os.truncate(path, _end_of(path, step))


def _last_evaluated(path: Path) -> int | None:
    """Returns the step of the last line if it is the line of an evaluation, which follows the metrics of its step."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - BLOCK))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2] + b"\n"
    return int(_step_of(last)) if f'"{EVALUATED}/'.encode() in last and _step_of(last) < float("inf") else None


def _end_of(path: Path, step: int) -> int:
    """Returns the number of bytes up to the end of the last line with a step of at most `step`.

    Steps increase in a file, so it is read from the end: the logs of a long run have gigabytes, and all ranks wait.
    """
    with path.open("rb") as file:
        start, text = file.seek(0, os.SEEK_END), b""  # `text` begins at `start` in the file
        while start or text:
            last = text.rfind(b"\n", 0, -1) + 1  # start of the last line
            if start and not last:
                size = min(max(BLOCK, len(text)), start)
                start = file.seek(start - size)
                text = file.read(size) + text
            elif _step_of(text[last:]) <= step:
                break
            else:
                text = text[:last]
        return start + len(text)


def _step_of(line: bytes) -> float:
    """Returns the step of a line; infinity for a line that a crash has truncated."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
