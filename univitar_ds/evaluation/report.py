"""Renders results as Markdown tables that are also readable in a terminal, with the chance level of every score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from univitar_ds.config.run_folder import CONFIG, EVALUATION, SUMMARY, not_a_run
from univitar_ds.errors import UserError
from univitar_ds.evaluation.results import read_evaluation, read_summary


def render_run(run: str | Path) -> str:
    """Returns the evaluation of a run, the metrics of its training and the duration of each part.

    Raises: UserError if the folder contains neither an evaluation nor a summary, or if one of them is damaged.
    """
    run = Path(run)
    summary, evaluation = read_summary(run), read_evaluation(run)
    if not evaluation and not summary:
        if not (run / CONFIG).is_file():
            raise UserError(not_a_run(run))
        raise UserError(
            f"{run} has no results yet ({EVALUATION} and {SUMMARY}), because its training has not ended; "
            f"`univitar-ds report {run} --out report.html` draws its curves"
        )
    return render_results(evaluation, summary)


def render_results(evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Returns both as tables; an empty one is left out."""
    parts = [render_evaluation(evaluation)] if evaluation else []
    return "\n\n".join([*parts, render_summary(summary)] if summary else parts)


def render_evaluation(evaluation: Mapping[str, Any]) -> str:
    """Returns the content of `evaluation.json` as a table, followed by its notes."""
    averaged = ", averaged weights" if evaluation.get("weights") == "averaged" else ""
    return render_figures(f"Held-out data, {evaluation['checkpoint']}{averaged}", evaluation)


def render_figures(title: str, result: Mapping[str, Any]) -> str:
    """Returns the `figures` of a result as a table, followed by its `notes`."""
    heads = ("task", "measure", "result", "95 %", "chance", "x chance", "n", "among")
    rows = [
        (
            name_of(figure),
            figure["measure"],
            percent(figure["value"]),
            interval_text(figure.get("interval")),
            percent(figure["chance"]),
            f"{figure['value'] / figure['chance']:.1f}",
            str(figure["n"]),
            str(figure["candidates"]),
        )
        for figure in result["figures"]
    ]
    return "\n".join([title, "", table(heads, rows, left=2), *result["notes"]])


def render_summary(summary: Mapping[str, Any]) -> str:
    """Returns the numbers and strings of `summary.json` as a table, and its durations as a second table."""
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
    """Returns a table of the duration of each part and of their total."""
    rows = [(name, _duration(value)) for name, value in seconds.items()]
    return table(("part", "time"), [*rows, ("all together", _duration(sum(seconds.values())))], left=1)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Returns a Markdown table with padded columns: the first `left` aligned left, the others right."""
    heads, *rows = ([" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in (heads, *rows))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * (width + 1) + ("-" if index < left else ":") for index, width in enumerate(widths))
    return "\n".join([line(heads), f"|{'|'.join(rule)}|", *map(line, rows)])


def name_of(figure: Mapping[str, Any]) -> str:
    """Returns the task of a figure with its set or modality, unless the task names that, as "text to image" does."""
    task = figure["task"]
    if figure.get("set"):
        return f"{task} ({figure['set']})"
    named = task.endswith(("text", "image", "video")) or task == "classification"
    return task if named else f"{task} of {figure['modality']}s"


def percent(share: float) -> str:
    """Returns a share in percent."""
    return f"{100 * share:.1f} %"


def interval_text(interval: Sequence[float] | None) -> str:
    """Returns the bounds of an interval of a share in percent, "" for None."""
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _number(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
