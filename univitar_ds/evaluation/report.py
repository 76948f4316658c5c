"""Results as Markdown tables, readable in a terminal too, with the chance level next to every figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from univitar_ds.config.run_folder import EVALUATION, SUMMARY
from univitar_ds.errors import UserError


def render_run(run: str | Path) -> str:
    """The results of a run, the figures of its training and the time of each part.

    Raises: UserError if the folder holds neither an evaluation nor a summary.
    """
    run = Path(run)
    parts = []
    summary = _read(run / SUMMARY)
    evaluation = _read(run / EVALUATION)
    if evaluation is None and summary is None:
        raise UserError(f"{run} holds neither {EVALUATION} nor {SUMMARY}; name the folder of a run that has ended")
    if evaluation is not None:
        parts.append(render_evaluation(evaluation))
    if summary is not None:
        parts.append(render_summary(summary))
    return "\n\n".join(parts)


def render_evaluation(evaluation: Mapping[str, Any]) -> str:
    """The content of `evaluation.json` as a table, with a sentence for what could not be measured."""
    heads = ("task", "measure", "result", "chance", "x chance", "n", "among")
    rows = [
        (
            figure["task"] + (f" ({figure['set']})" if "set" in figure else _of(figure)),
            figure["measure"],
            f"{100 * figure['value']:.1f} %",
            f"{100 * figure['chance']:.1f} %",
            f"{figure['value'] / figure['chance']:.1f}",
            str(figure["n"]),
            str(figure["candidates"]),
        )
        for figure in evaluation["figures"]
    ]
    averaged = ", averaged weights" if evaluation.get("weights") == "averaged" else ""
    title = f"Held-out data, {evaluation['checkpoint']}{averaged}"
    return "\n".join([title, "", table(heads, rows, left=2), *evaluation["notes"]])


def render_summary(summary: Mapping[str, Any]) -> str:
    """The plain entries of `summary.json`, and its times as a separate table."""
    plain = [(key, _number(value)) for key, value in summary.items() if isinstance(value, str | int | float)]
    last = summary.get("last") or {}
    if "mfu_pct" in last:
        note = f" ({last['mfu_note']})" if "mfu_note" in last else ""
        plain.append(("mfu_pct of the last steps", f"{_number(last['mfu_pct'])}{note}"))
    parts = [table(("training", "value"), plain, left=1)] if plain else []
    if summary.get("seconds"):
        parts.append(render_times(summary["seconds"]))
    return "\n\n".join(parts)


def render_times(seconds: Mapping[str, float]) -> str:
    """The time of each part and the total."""
    rows = [(name, _duration(value)) for name, value in seconds.items()]
    return table(("part", "time"), [*rows, ("all together", _duration(sum(seconds.values())))], left=1)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table with even columns; the first `left` of them are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * (width + 1) + ("-" if index < left else ":") for index, width in enumerate(widths))
    return "\n".join([line(heads), f"|{'|'.join(rule)}|", *map(line, rows)])


def _of(figure: Mapping[str, Any]) -> str:
    return f" of {figure['modality']}s" if figure["task"] == "zero-shot" else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _number(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); evaluate the run again") from error
