"""The log files and the progress line of a run."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.run_folder import BOARD, EVENTS, METRICS
from univitar_ds.config.schema import LoggingConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.errors import writing
from univitar_ds.extras import extra

logger = logging.getLogger(__name__)

BLOCK = 1 << 16
"""Size in bytes of the blocks in which a file is read from its end."""
SKIPPED = "skipped"
"""Prefix of the sample logs that contain the steps that a rollback undid."""


class MetricLog:
    """metrics.jsonl, TensorBoard and the progress line, with the same names of metrics; only on rank 0."""

    def __init__(self, run: Path, cfg: LoggingConfig, *, step: int, samples: int, total_samples: int) -> None:
        """Opens the files after `step`, and drops later lines, which an earlier launch or a rollback left behind."""
        self._file = _open_after(run / METRICS, step)
        self._board = None
        if cfg.tensorboard:
            with extra("train"):
                from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / BOARD), purge_step=step + 1)
            _quiet_board()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_samples, initial=samples, unit=" samples", dynamic_ncols=True, smoothing=0.1)

    def advance(self, samples: int) -> None:
        if self._bar is not None:
            with self._terminal():
                self._bar.update(samples)

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Disables the progress line if the terminal has closed."""
        try:
            yield
        except OSError:
            self._bar.disable, self._bar = True, None

    def write(self, line: dict[str, Any]) -> None:
        """Writes a line to metrics.jsonl (with all digits), TensorBoard, and the progress line or the log."""
        append_line(self._file, line)
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, line["step"])
        text = f"loss {line['loss']:.4f}, lr {line['lr']:.2e}, grad norm {line['grad_norm']:.2f}"
        if self._bar is not None:
            with self._terminal():
                self._bar.set_description(f"{line['stage']} step {line['step']}")
                self._bar.set_postfix_str(f"{text}, {mfu_text(line)}")
        else:
            logger.info(
                "step %d, %s %s, %s, %.1f samples/s, %s, fill %.0f %%, data wait %.0f %%",
                *(line[name] for name in ("step", "stage", "modality")),
                text,
                line["samples_per_s"],
                mfu_text(line),
                *(line[name] for name in ("fill_pct", "data_wait_pct")),
            )

    def mark(self, event: dict[str, Any]) -> None:
        """Writes an event as text to TensorBoard, and to the terminal or the log."""
        detail = event_text(event)
        if self._board is not None:
            self._board.add_text("events", detail, event["step"])
        if self._bar is not None:
            with self._terminal():
                self._bar.write(detail, file=sys.stderr)
        else:
            logger.log(logging.WARNING if event["event"] == "rollback" else logging.INFO, "%s", detail)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Writes an image to TensorBoard."""
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Closes all files, also if closing one fails, as on a full disk. Can be called again."""
        with ExitStack() as closing:
            closing.callback(self._close_bar)
            if self._board is not None:
                closing.callback(self._board.close)
            closing.callback(self._file.close)

    def _close_bar(self) -> None:
        if self._bar is not None:
            with self._terminal():
                self._bar.close()


class SampleLog:
    """samples-rank*.jsonl: the keys of the samples of each step, per lane of this rank."""

    def __init__(self, run: Path, rank: int) -> None:
        self._file = (run / f"samples-rank{rank}.jsonl").open("a", encoding="utf-8")

    def write(self, step: int, batches: Sequence[PackedBatch]) -> None:
        for batch in batches:
            append_line(self._file, {"step": step, "lane": batch.lane, "modality": batch.modality, "keys": batch.keys})

    def close(self) -> None:
        self._file.close()


def cut_sample_logs(run: Path, step: int, *, keep_as: str | None = None) -> None:
    """Removes the lines after `step` from the sample logs of all ranks.

    With `keep_as` the lines of `samples-rank0.jsonl` are appended to `<keep_as>-rank0.jsonl`, and so on.
    """
    for path in run.glob("samples-rank*.jsonl"):
        if keep_as is not None:
            with path.open("rb") as old, (run / path.name.replace("samples", keep_as, 1)).open("ab") as kept:
                old.seek(_end_of(path, step))
                kept.writelines(line for line in old if step < _step_of(line) < float("inf"))
        _open_after(path, step).close()


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
    return f"stage {event['stage']} begins after step {event['step']}, {event['samples_seen']} samples"


def write_events(run: Path, events: Sequence[dict[str, Any]]) -> None:
    """Writes events.jsonl: stages that began and rollbacks, one per line."""
    replace_text(run / EVENTS, "".join(json.dumps(event) + "\n" for event in events))


def _open_after(path: Path, step: int) -> TextIO:
    """Opens a file of JSON lines for appending after `step`. Removes later lines and a line truncated by a crash."""
    if path.exists():
        os.truncate(path, _end_of(path, step))
    return path.open("a", encoding="utf-8")


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


def append_line(file: TextIO, line: dict[str, Any]) -> None:
    with writing(file.name):
        file.write(json.dumps(line) + "\n")
        file.flush()


def _quiet_board() -> None:
    """Suppresses the traceback of an OSError in TensorBoard's thread, since the next call raises the error again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
