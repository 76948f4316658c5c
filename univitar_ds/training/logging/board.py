"""The curves, texts and images of a run in TensorBoard, and the groups of its metrics."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from univitar_ds.config.run_folder import BOARD, METRICS
from univitar_ds.extras import extra
from univitar_ds.training.logging.kept_log import KeptLog

GROUPS = (
    ("loss", r"loss(_.+)?|teacher_agreement"),
    ("grad_norm", r"grad_norm(_.+)?"),
    ("time", r"(data_wait|forward|backward|optimizer|collectives|other)(_max)?_s"),
    ("speed", r"(samples|tokens)_per_s|step_s|mfu_pct|tflops_per_rank|(data_wait|fill|flop_imbalance)_pct|memory_gb"),
    ("data", r"(samples|tokens)_seen|downscaled_pct|side_px_.+|(bad|ignored|filtered)_.+"),
    ("schedule", r"lr|.+_weight|logit_(scale|bias)|stage_index|rollbacks|skipped_updates"),
)
"""Groups of metrics with a pattern of their names."""
EVALUATED, OF_TRAINED = "eval", "eval/trained"
"""Groups of evaluation figures: of the weights that are exported, and, if those are an average, of the trained ones."""
POINT_BYTES = 200
"""Bytes that a point takes while it is kept, about."""
RESTING = (0.0, 1.0)
"""A metric that has had only one of these values, such as 0 bad samples, is not drawn."""


def tag(name: str) -> str:
    """Returns the name of a metric with its group, such as `loss/loss_image`."""
    group = next((group for group, pattern in GROUPS if re.fullmatch(pattern, name)), "other")
    return f"{group}/{name}"


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of metrics, except its step, by their names with groups."""
    return {
        tag(name): value
        for name, value in line.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }


def results(figures: Sequence[Mapping[str, Any]], group: str = EVALUATED) -> dict[str, float]:
    """Returns the figures of evaluation.json by their names in the group `eval`, such as `eval/zero-shot_top-1_image`.

    Args: figures: as `Figure.to_dict` returns them; group: beginning of the names."""
    named = {}
    for figure in figures:
        words = [figure["task"], figure["measure"], figure["modality"], figure.get("set") or ""]
        name = "_".join(re.sub(r"[^\w@.-]+", "-", word).strip("-") for word in words if word)
        named[f"{group}/{name}"] = float(figure["value"])
    return named


def code_block(text: str) -> str:
    """Returns `text` as Markdown that TensorBoard shows line by line."""
    return "".join(f"    {line}\n" for line in text.splitlines())


class Board(KeptLog):
    """TensorBoard's files of a run, in its folder `tb`."""

    def __init__(self, run: Path, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Opens an event file that continues after `step`. TensorBoard no longer shows later points of earlier
        files. Args: check: see `KeptLog`."""
        super().__init__(run / BOARD, "points", check)
        self._moving = _moving(run / METRICS, step)
        self._resting: dict[str, tuple[int, float]] = {}
        self._step = step
        self._newest: list[tuple[int, Callable[[Any], object]]] = []
        """What was written for the last step: a further file begins with that step, and hides it in earlier files."""
        self._board: Any = _opened(self.path, step + 1)
        _quiet()

    def scalars(self, line: Mapping[str, Any]) -> None:
        """Writes the numbers of a line of metrics. A metric whose first value is one of RESTING is drawn once it
        changes."""
        step = self._step = line["step"]
        points: list[tuple[str, float, int]] = []
        for name, value in numbers(line).items():
            if name not in self._moving:
                before, first = self._resting.setdefault(name, (step, value))
                if value == first and value in RESTING:
                    continue
                del self._resting[name]
                self._moving.add(name)
                if before < step:
                    points.append((name, first, before))
            points.append((name, value, step))
        self._write(step, lambda board: [board.add_scalar(*point) for point in points], POINT_BYTES * len(points))

    def points(self, values: Mapping[str, float], step: int) -> None:
        """Writes values by their names with groups."""
        named = dict(values)
        self._write(
            step,
            lambda board: [board.add_scalar(name, value, step) for name, value in named.items()],
            POINT_BYTES * len(named),
        )

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text in Markdown."""
        self._write(step, lambda board: board.add_text(name, text, step), len(text))

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Writes an image."""
        pixels = np.asarray(image)
        self._write(step, lambda board: board.add_image(name, pixels, step, dataformats="HWC"), pixels.nbytes)

    def close(self) -> None:
        """Writes the values that never changed as a text, and closes the file."""
        try:
            if self._resting:
                table = "".join(f"| {name} | {value:g} |\n" for name, (_, value) in sorted(self._resting.items()))
                self.text("unchanged", f"| metric | value |\n|---|---|\n{table}", self._step)
            super().close()
        finally:
            if self._board is not None:
                self._board.close()

    def _write(self, step: int, call: Callable[[Any], object], size: int) -> None:
        self._add((step, call), size)

    def _put(self, entries: list[tuple[int, Callable[[Any], object]]]) -> None:
        newest = self._newest
        if self._board is None:  # in a further file, since the earlier one may end within an entry
            first = min(step for step, _ in entries)
            entries = [*(one for one in newest if one[0] >= first), *entries]
            newest = []
            self._board = _opened(self.path, first)
        try:
            for _, call in entries:
                call(self._board)
            self._board.flush()
            self._newest = [one for one in (*newest, *entries) if one[0] == entries[-1][0]]
        except OSError:
            board, self._board = self._board, None
            with suppress(OSError):
                board.close()
            raise


def _opened(folder: Path, purge_step: int) -> Any:
    with extra("train"):
        from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


def _moving(metrics: Path, step: int) -> set[str]:
    """Returns the names, with groups, of the metrics that are drawn after the lines up to `step`.

    The first and the last line suffice: metrics that rest at 0 or 1 are counts, which only grow, and weights."""
    lines = [numbers(line) for line in _ends(metrics)] if step else []
    if not lines:
        return set()
    first, last = lines[0], lines[-1]
    return {name for name, value in last.items() if first.get(name) != value or value not in RESTING}


def _ends(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the first and the last line of steps in a file of JSON lines, except incomplete ones."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        ends = list(itertools.islice(filter(_is_of_step, file), 1))
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 16)))
        ends += list(filter(_is_of_step, file.read().splitlines(keepends=True)))[-1:]
    for end in ends:
        try:
            line = json.loads(end)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def _is_of_step(line: bytes) -> bool:
    """Whether a line is one of a step, and not one of an evaluation."""
    return f'"{EVALUATED}/'.encode() not in line


def _quiet() -> None:
    """Suppresses the traceback of an OSError in TensorBoard's thread, since the next call raises the error again."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread" or not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
