"""Collects the results of many evaluations, such as those of an array of jobs, in one table."""

from __future__ import annotations

import csv
import io
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from univitar_ds.errors import DataError, UserError
from univitar_ds.evaluation.report import name_of, percent, table
from univitar_ds.evaluation.results import read_result
from univitar_ds.owned import check_result, write_result
from univitar_ds.regular_files import read_bytes

CSV = ".csv"
logger = logging.getLogger(__name__)
_TITLE = "Results of univitar-ds eval"
_ABOUT = ("data", "task", "measure", "chance", "n", "among")
_CSV = ("model", "data", "task", "measure", "modality", "set", "value", "low", "high", "chance", "n", "candidates")


@dataclass(frozen=True)
class Collected:
    """The figures of several models. `cells` has the figure of each row and model; the key of a row is that of
    `_key`."""

    models: list[str]
    cells: dict[tuple[str, ...], dict[str, Mapping[str, Any]]]
    repeated: int
    """Number of figures that a later file has replaced."""
    damaged: list[str] = field(default_factory=list)
    """Files that are left out since they cannot be read, each with the reason."""


def collect(paths: Sequence[Path]) -> Collected:
    """Reads results: JSON files of `eval TASK --json` or `eval RUN --out`, and folders with such files.

    Files are read in the order of the arguments, and in a folder in the order of their names. A damaged file is left
    out with a warning: one of the many jobs of an array must not hide the results of all others.
    Raises: UserError if a file does not exist, there is none, or all are damaged.
    """
    models: dict[str, None] = {}
    cells: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    repeated = 0
    damaged: list[str] = []
    files = _files(paths)
    for path in files:
        try:
            result = read_result(path)
        except UserError as error:
            if len(files) == 1 or (path in paths and not path.exists()):  # in a folder, a link may lead nowhere
                raise
            logger.warning("%s; it is left out", error)
            damaged.append(str(error))
            continue
        model, data = str(result.get("model") or result.get("checkpoint") or path.stem), _data_of(result)
        models[model] = None
        for figure in result["figures"]:
            row = cells.setdefault(_key(data, figure), {})
            repeated += model in row
            row[model] = figure
    if len(damaged) == len(files):
        raise DataError(f"none of the {len(files)} results can be read: {damaged[0]}")
    return Collected(list(models), cells, repeated, damaged)


def _files(paths: Sequence[Path]) -> list[Path]:
    found = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not found:
        raise DataError(
            f"no result in {', '.join(map(str, paths))}: there is no *.json; name files that `univitar-ds eval TASK "
            "MODEL --json` has printed, or their folder"
        )
    return found


def _data_of(result: Mapping[str, Any]) -> str:
    """Returns the data of a result; an evaluation of a run has several sources."""
    sources = result.get("sources")
    if isinstance(result.get("data"), str) or not isinstance(sources, list):
        return str(result.get("data") or "")
    return ", ".join(str(source.get("path")) for source in sources if isinstance(source, dict))


def _key(data: str, figure: Mapping[str, Any]) -> tuple[str, ...]:
    return data, figure["task"], figure["measure"], figure["modality"], figure.get("set") or ""


def render(found: Collected) -> str:
    """Returns a Markdown table with a row for each figure and a column for each model; "-" where there is no result."""
    data, names = _short([key[0] for key in found.cells]), _short(found.models)
    rows = []
    for key, row in found.cells.items():
        any_figure = next(iter(row.values()))
        about = [data[key[0]], name_of(any_figure), any_figure["measure"]]
        about += [percent(any_figure["chance"]), str(any_figure["n"]), str(any_figure["candidates"])]
        values = [percent(row[model]["value"]) if model in row else "-" for model in found.models]
        rows.append([*about, *values])
    heads = [*_ABOUT, *(names[model] for model in found.models)]
    lines = [f"{_TITLE}: {len(found.models)} models, {len(found.cells)} figures", "", table(heads, rows, left=3)]
    if found.repeated:
        lines.append(f"{found.repeated} figures were in several files; those of the last file are shown.")
    if found.damaged:
        lines.append(f"{len(found.damaged)} files are left out: {'; '.join(found.damaged)}.")
    return "\n".join(lines)


def _short(names: Sequence[str]) -> dict[str, str]:
    """Returns the names without the folders that all of them share."""
    parts = {name: name.split("/") for name in names}
    columns = zip(*(one[:-1] for one in parts.values()), strict=False)
    shared = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns))) if len(parts) > 1 else 0
    return {name: "/".join(one[shared:]) for name, one in parts.items()}


def as_csv(found: Collected) -> str:
    """Returns a CSV with a row for each figure of each model, with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for (data, task, measure, modality, name), row in found.cells.items():
        for model, one in row.items():
            low, high = one.get("interval") or ("", "")
            about = (one["value"], low, high, one["chance"], one["n"], one["candidates"])
            writer.writerow([model, data, task, measure, modality, name, *about])
    return text.getvalue()


def write_table(found: Collected, path: Path) -> None:
    """Writes the table, as CSV if the name of the file ends in .csv, else as Markdown. Replaces an earlier table.

    Raises: ConfigError if `path` is a file that is not such a table; StorageError if it cannot be written."""
    is_csv = path.name.lower().endswith(CSV)
    begin = ",".join(_CSV) if is_csv else _TITLE
    check_result(path, lambda there: read_bytes(there).startswith(begin.encode()))
    text = as_csv(found) if is_csv else f"{render(found)}\n"
    write_result(path, text.encode("utf-8", "backslashreplace").decode())  # names of files need not be UTF-8
