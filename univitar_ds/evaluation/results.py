"""Reads the results in the folder of a run, which another program may have written or damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

from univitar_ds.config.run_folder import EVALUATION, SUMMARY
from univitar_ds.errors import UserError, shortened
from univitar_ds.regular_files import is_regular, read_utf8

_Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
_Count = Annotated[int, Strict(), Field(ge=0)]
_Text = Annotated[str, Strict()]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Figure(_Shape):
    task: _Text
    measure: _Text
    modality: _Text
    value: _Number
    chance: Annotated[float, Strict(), Field(gt=0)]
    n: _Count
    candidates: _Count
    interval: tuple[_Number, _Number] | None = None
    set: _Text | None = None


class _Evaluation(_Shape):
    checkpoint: _Text
    weights: _Text = ""
    figures: list[_Figure]
    notes: list[_Text]


class _Result(_Shape):
    model: _Text | None = None
    checkpoint: _Text | None = None
    figures: list[_Figure]


class _Summary(_Shape):
    seconds: dict[str, _Number] | None = None
    last: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None


def read_evaluation(run: Path) -> dict[str, Any]:
    """Returns the content of evaluation.json; empty if there is none yet.

    Raises: UserError if it is damaged; CheckpointError if it is a pipe or a device.
    """
    return _read(run / EVALUATION, _Evaluation, "evaluate the run again")


def read_summary(run: Path) -> dict[str, Any]:
    """Returns the content of summary.json; empty if there is none yet. Raises: as `read_evaluation`."""
    return _read(run / SUMMARY, _Summary, "remove it, or resume the run, which writes it")


def read_result(path: Path) -> dict[str, Any]:
    """Returns the content of a file of results: of `eval TASK --json` or `eval RUN --out`.

    Raises: UserError if there is no such file or it is damaged; CheckpointError if it is a pipe or a device.
    """
    if not is_regular(path):
        raise UserError(
            f"there is no file {path}; name a file that `univitar-ds eval` has written, or a folder of them"
        )
    return _read(path, _Result, "measure it again, or remove it")


def int64(text: str) -> int:
    """Parses an integer of JSON, for `parse_int`. Raises: ValueError if it has more than 64 bits."""
    value = int(text)
    if abs(value) >= 1 << 63:
        raise ValueError(f"{shortened(text)} is above 64 bits")
    return value


def _read(path: Path, shape: type[_Shape], remedy: str) -> dict[str, Any]:
    if not is_regular(path):
        return {}
    try:
        content = json.loads(read_utf8(path), parse_int=int64)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; allow its reading") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    try:
        shape.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {_fault(error)}; {remedy}") from error
    return content


def _fault(error: ValidationError) -> str:
    """Returns a phrase about the first fault: its place, and the value that is wrong there."""
    first = error.errors()[0]
    place = shortened(".".join(map(str, first["loc"])), 120)
    if first["type"] == "missing":
        return f"{place} is missing"
    words = re.sub(r"^Input |valid | or instance of \w+$", "", first["msg"])
    return f"{place} is {shortened(repr(first['input']))} and {words}"
