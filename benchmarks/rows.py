"""Columns for the machine and the commit of a measurement, and writing of rows to the CSV files in results/."""

from __future__ import annotations

import csv
import functools
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@functools.cache
def git_commit() -> str:
    """Returns the commit that is checked out; "unknown" outside of a repository or without git."""
    if shutil.which("git") is None:
        return "unknown"
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def processor() -> str:
    """Returns the model name of the CPU, or the machine type if /proc/cpuinfo has no name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def add_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a CSV file; existing rows stay.

    Raises: SystemExit if the file has other columns.
    """
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file), [])
        if columns != list(rows[0]):
            raise SystemExit(f"{path} has the columns {columns}, the rows have {list(rows[0])}; move the file away")
    _write(path, "a", rows, header=new)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV file of these rows; existing rows are lost."""
    _write(path, "w", rows, header=True)


def _write(path: Path, mode: str, rows: Sequence[dict[str, Any]], *, header: bool) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)


def rounded(value: float | None, digits: int = 4) -> float | None:
    """Rounds to `digits` significant digits; None stays None."""
    return None if value is None else float(f"{value:.{digits}g}")
