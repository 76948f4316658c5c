"""Lists the media files of a folder with their texts: from its metadata.jsonl, or from a .txt for each file.

No media file is opened. If a metadata.jsonl has faults, packing ends with one error that lists the first of them.
If a .txt has a fault, its media file is left out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from univitar_ds.data.writing.sidecars import read_sidecars
from univitar_ds.errors import DataError

METADATA = "metadata.jsonl"
_KINDS = (None, "image", "video")
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_REPORTED = 5


@dataclass(frozen=True)
class Row:
    """One media file. `file` is relative to the folder, with slashes; if `kind` is None, the content determines it.

    `set` names the data set of the label, if a folder holds several.
    """

    file: str
    kind: str | None
    captions: tuple[str, ...]
    label: str | None
    split: str
    set: str | None = None


@dataclass(frozen=True)
class Listing:
    """The rows in the order of the folder, and the reason for each file or folder left out."""

    rows: list[Row]
    left_out: dict[str, str]


class _Fault(Exception):
    """A fault of one row."""


def read_folder(folder: Path, captions: Literal["one", "lines"] = "one") -> Listing:
    """Read all rows of a folder. `captions`: whether a .txt has one caption, or one per line.

    Raises: DataError if the folder is missing or has no media file, or for the faults of its rows, of which it names 5.
    """
    if not folder.is_dir():
        tar = " (a tar needs no packing: give it as a source)" if folder.suffix.lower() == ".tar" else ""
        raise DataError(f"{folder} is no folder{tar}; give one with media files and a {METADATA} or .txt captions")
    metadata = folder / METADATA
    faults: list[str] = []
    left_out: dict[str, str] = {}
    if metadata.is_file():
        if captions == "lines":
            raise DataError(f"{metadata} lists captions itself; --captions lines is for folders of .txt, leave it out")
        rows = _from_metadata(folder, metadata, faults)
    else:
        sidecars = read_sidecars(folder, lines=captions == "lines")
        rows = [Row(file, None, texts, None, "train") for file, texts in sidecars.captions.items()]
        left_out = sidecars.left_out
    if faults:
        rest = f" (and {len(faults) - _MAX_REPORTED} more)" if len(faults) > _MAX_REPORTED else ""
        raise DataError(
            f"{folder}: {len(faults)} faults in its descriptions, nothing was packed; correct or remove: "
            + "; ".join(faults[:_MAX_REPORTED])
            + rest
        )
    if not rows:
        first = next((f", the first: {file}: {reason}" for file, reason in left_out.items()), "")
        why = f" ({len(left_out)} left out{first})" if left_out else ""
        raise DataError(
            f"{folder} has nothing to pack{why}; it needs a {METADATA} with a row per file, "
            "or a .txt of the same name for each media file"
        )
    return Listing(rows, left_out)


def _from_metadata(folder: Path, metadata: Path, faults: list[str]) -> list[Row]:
    rows: list[Row] = []
    lines: dict[str, int] = {}
    try:
        stream = metadata.open("rb")
    except OSError as error:
        raise DataError(f"{metadata}: cannot be read ({error.strerror}); check its permissions") from error
    with stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = _row(folder, _fields(line))
                if row.file in lines:
                    raise _Fault(f"file {row.file!r} is in line {lines[row.file]} too; join their captions in one row")
            except _Fault as fault:
                faults.append(f"{METADATA}:{number}: {fault}")
                continue
            lines[row.file] = number
            rows.append(row)
    return rows


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _Fault(f"no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _Fault(f"a {type(fields).__name__}, not an object with file and caption")
    return fields


def _row(folder: Path, fields: dict[str, Any]) -> Row:
    kind, split, label = fields.get("kind"), fields.get("split", "train"), fields.get("label")
    data_set = fields.get("set")
    if kind not in _KINDS:
        raise _Fault(f"kind {_short(kind)} is neither image nor video")
    if not isinstance(split, str) or not _SPLIT.fullmatch(split):
        raise _Fault(f"split {_short(split)} is not a name of letters, digits, - and _ (not first), at most 64")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise _Fault(f"label {_short(label)} is not text")
    if not isinstance(data_set, str | None):
        raise _Fault(f"set {_short(data_set)} is not text")
    text_label = None if label is None else str(label)
    return Row(_inside(folder, fields.get("file")), kind, _captions(fields), text_label, split, data_set)


def _captions(fields: dict[str, Any]) -> tuple[str, ...]:
    captions = fields.get("captions")
    if captions is None:
        captions = [fields["caption"]] if "caption" in fields else []
    if not isinstance(captions, list) or not captions:
        raise _Fault(f"captions {_short(captions)} is not a list with at least one text; give that, or a caption")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise _Fault(f"caption {_short(caption)} is not text, or is empty")
    return tuple(caption.strip() for caption in captions)


def _inside(folder: Path, file: Any) -> str:
    """The normalized path of an existing file in the folder."""
    if not isinstance(file, str) or not file or "\0" in file:
        raise _Fault(f"file {_short(file)} is no path")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise _Fault(f"file {file!r} must be a path relative to the folder, without '..'")
    try:
        found = (folder / path).is_file()
    except (OSError, UnicodeError):
        found = False
    if not found:
        raise _Fault(f"file {file!r} is missing")
    return str(path)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
