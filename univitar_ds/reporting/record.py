"""Reads the folder of a run: configuration, metrics, events, results and images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CONFIG, EVENTS, EXAMPLES, METRICS, not_a_run
from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import UserError
from univitar_ds.evaluation.results import int64, read_evaluation, read_summary
from univitar_ds.geometry import Modality
from univitar_ds.regular_files import is_regular, open_regular

MOST_LINES = 4000
"""Maximum number of lines of metrics.jsonl that are kept, besides the last. Of more, every 2nd, 4th, ... is kept."""
_LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder.

    `lines`: every `stride`-th line of metrics.jsonl, and the last; `events`: the lines of events.jsonl; `summary`,
    `evaluation`: empty if the run has not written them yet; `examples`: files of the evaluation's images, by the keys
    of EXAMPLES.
    """

    folder: Path
    name: str
    config: RunConfig
    lines: list[dict[str, Any]]
    stride: int
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    examples: dict[tuple[Modality, bool], Path]


def read_run(folder: Path) -> RunRecord:
    """Reads the folder of a run, which may still be training. Lines that are not JSON objects with a step are skipped.

    Raises: UserError if the folder is not that of a run, or a file in it is damaged; ConfigError if its configuration
        is invalid.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(not_a_run(folder))
    config = load_config(folder / CONFIG)
    lines, stride = _subsampled(_objects(folder / METRICS))
    examples = {kind: folder / name for kind, name in EXAMPLES.items()}
    return RunRecord(
        folder,
        config.name,
        config,
        lines,
        stride,
        list(_objects(folder / EVENTS)),
        read_summary(folder),
        read_evaluation(folder),
        {kind: path for kind, path in examples.items() if is_regular(path)},
    )


def _subsampled(lines: Iterator[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Returns every n-th line, at most `MOST_LINES`, with the last line in addition; and n, a power of two."""
    kept: list[dict[str, Any]] = []
    stride, line = 1, None
    for number, line in enumerate(lines):
        if number % stride == 0:
            kept.append(line)
            if len(kept) > MOST_LINES:
                kept, stride = kept[::2], 2 * stride
    if line is not None and kept[-1] is not line:
        kept.append(line)
    return kept, stride


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects with a step in a file of JSON lines, which the trainer may be writing.

    Yields nothing if the file does not exist. Lines above _LINE_LIMIT bytes are not read as a whole, and so are
    skipped.
    """
    if not is_regular(path):
        return
    with open_regular(path) as file:
        while line := file.readline(_LINE_LIMIT):
            try:
                value = json.loads(line, parse_int=int64)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                yield value
