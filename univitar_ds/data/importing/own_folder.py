"""Lists the media files of a folder with their texts: from its metadata.jsonl, or from a .txt for each file.

No media file is opened. If a metadata.jsonl has faults, packing ends with one error that lists the first of them.
If a .txt has a fault, its media file is left out.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.rows import (
    Fault,
    Listing,
    ReadOptions,
    Row,
    checked_split,
    first_left_out,
    is_media,
    short,
)
from univitar_ds.data.importing.sidecars import read_sidecars, texts_by_stem
from univitar_ds.errors import DataError

METADATA = "metadata.jsonl"
_KINDS = (None, "image", "video")
_MAX_REPORTED = 5


def recognises(source: str) -> bool:
    """Whether a source is a folder with a .txt for at least one media file."""
    folder = Path(source)
    return any(
        Path(name).stem in texts
        for _, names in (folders_of(folder, {}) if folder.is_dir() else ())
        if (texts := texts_by_stem(names))
        for name in names
        if is_media(name)
    )


def rows(source: str, options: ReadOptions) -> Listing:
    """Returns all rows of a folder.

    Raises: DataError if the folder is missing or has no media file, or if rows have faults, of which the error names 5.
    """
    folder, captions = Path(source), options.captions
    if not folder.is_dir():
        csv = f"univitar-ds data pack {folder} OUT --format csv"
        what = f"is a file of unknown format ({csv} packs it as CSV)" if folder.is_file() else "is not a folder"
        raise DataError(
            f"{folder} {what}; give a folder with media files, a tar, a table (.csv, .tsv, .jsonl, .json, .parquet), "
            "or a JSON of COCO"
        )
    metadata = folder / METADATA
    faults: list[str] = []
    left_out: dict[str, str] = {}
    if metadata.is_file():
        if captions == "lines":
            raise DataError(f"{metadata} lists captions itself; --captions lines is for folders of .txt, leave it out")
        found = _from_metadata(folder, metadata, options.default_split, faults)
    else:
        sidecars = read_sidecars(folder, lines=captions == "lines")
        found = [Row(file, None, texts, None, options.default_split) for file, texts in sidecars.captions.items()]
        left_out = sidecars.left_out
    if faults:
        rest = f" (and {len(faults) - _MAX_REPORTED} more)" if len(faults) > _MAX_REPORTED else ""
        raise DataError(
            f"{folder}: {len(faults)} faults in its descriptions, nothing was packed; correct or remove them: "
            + "; ".join(faults[:_MAX_REPORTED])
            + rest
        )
    if not found:
        inside = any("/" in name and is_media(name) for name in left_out)
        command = f"univitar-ds data pack {folder} OUT --format classes"
        classes = f"; if the names of its folders are labels: {command}, and name OUT" if inside else ""
        raise DataError(
            f"{folder} has nothing to pack{first_left_out(left_out)}; it needs a {METADATA} with a row per file, "
            f"or a .txt of the same name for each media file{classes}"
        )
    return Listing(found, left_out, folder)


def _from_metadata(folder: Path, metadata: Path, default_split: str, faults: list[str]) -> list[Row]:
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
                row = _row(folder, _fields(line), default_split)
                if row.file in lines:
                    raise Fault(f"file {row.file!r} is in line {lines[row.file]} too; join their captions in one row")
            except Fault as fault:
                faults.append(f"{METADATA}:{number}: {fault}")
                continue
            lines[row.file] = number
            rows.append(row)
    return rows


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Fault(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise Fault(f"a {type(fields).__name__}, not an object with file and caption")
    return fields


def _row(folder: Path, fields: dict[str, Any], default_split: str) -> Row:
    kind, split, label = fields.get("kind"), fields.get("split", default_split), fields.get("label")
    data_set = fields.get("set")
    if kind not in _KINDS:
        raise Fault(f"kind {short(kind)} is neither image nor video")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise Fault(f"label {short(label)} is not text")
    if not isinstance(data_set, str | None):
        raise Fault(f"set {short(data_set)} is not text")
    text_label = None if label is None else str(label)
    return Row(_inside(folder, fields.get("file")), kind, _captions(fields), text_label, checked_split(split), data_set)


def _captions(fields: dict[str, Any]) -> tuple[str, ...]:
    captions = fields.get("captions")
    if captions is None:
        captions = [fields["caption"]] if "caption" in fields else []
        if not captions and fields.get("label") not in (None, ""):
            return ()  # only a label
    if not isinstance(captions, list) or not captions:
        raise Fault(f"captions {short(captions)} is not a list with at least one text; give that, or a caption")
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            raise Fault(f"caption {short(caption)} is not text, or is empty")
    return tuple(caption.strip() for caption in captions)


def _inside(folder: Path, file: Any) -> str:
    """Returns the normalized path of an existing file in the folder. Raises: Fault."""
    if not isinstance(file, str) or not file or "\0" in file:
        raise Fault(f"file {short(file)} is not a path")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise Fault(f"file {file!r} must be a path relative to the folder, without '..'")
    try:
        found = (folder / path).is_file()
    except (OSError, UnicodeError):
        found = False
    if not found:
        raise Fault(f"file {file!r} is missing")
    return str(path)
