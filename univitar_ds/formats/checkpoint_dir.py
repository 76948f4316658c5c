"""Reads the folder of a run's checkpoints, which `training.checkpoint.atomic_dir` writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univitar_ds.errors import CheckpointError
from univitar_ds.regular_files import read_utf8

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
"""Text: the name of the evaluated checkpoint with the best result, if the run evaluates while it trains."""
_POINTER = 256
"""Characters of a pointer that are read."""
_READ_BYTES = 4 << 20
"""Bytes that are read and hashed at once. Hashing releases Python's lock, so other threads run meanwhile."""


def step_of(name: str) -> int:
    """Returns the step of a complete folder's name."""
    return int(name.removeprefix("step-"))


def complete(root: Path) -> list[Path]:
    """Returns the complete folders, oldest first."""
    folders = (folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", folder.name))
    return sorted((folder for folder in folders if (folder / MANIFEST).is_file()), key=lambda one: step_of(one.name))


def latest(root: Path) -> Path | None:
    """Returns the folder that `latest` names, or the newest complete one if it is missing; None if there is none."""
    name = named_in(root / LATEST)
    if name is not None and (root / name).is_dir():
        return root / name
    folders = complete(root)
    return folders[-1] if folders else None


def named_in(pointer: Path) -> str | None:
    """Returns the name of a checkpoint in the file `latest` or `best`; None without the file, or for any other text."""
    if not pointer.is_file():
        return None
    with pointer.open(encoding="utf-8", errors="replace") as file:
        name = file.read(_POINTER).strip()
    return name if re.fullmatch(r"step-\d{8,}", name) else None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the manifest's entry of each file of a complete folder, by name: {bytes, sha256}, or
    {bytes, parts: [[offset, bytes, sha256], ...]} for a file that several ranks wrote.

    Raises: CheckpointError if the manifest is missing or cannot be read."""
    try:
        files = json.loads(read_utf8(folder / MANIFEST))["files"]
        return {name: _manifest_entry(entry) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error}); {remedy(folder)}") from error


def _manifest_entry(entry: dict[str, Any]) -> dict[str, Any]:
    if "parts" not in entry:
        return {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
    parts = [[int(offset), int(size), str(digest)] for offset, size, digest in entry["parts"]]
    return {"bytes": int(entry["bytes"]), "parts": parts}


def parts_of(name: str, entry: dict[str, Any]) -> list[tuple[str, int, int, str]]:
    """Returns (name, offset, bytes, sha256) of each part of a file. Args: entry: its entry of `read_manifest`."""
    parts = entry.get("parts") or [[0, entry["bytes"], entry["sha256"]]]
    return [(name, *part) for part in parts]


def verify(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Compares files with their entries of a manifest.

    Raises: CheckpointError with every file of `entries` that is missing, truncated or altered, and the remedy."""
    found = faults(folder, entries)
    if found:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(found)}; {remedy(folder)}")


def remedy(folder: Path) -> str:
    """Returns the remedy for a damaged folder."""
    others = [other for other in complete(folder.parent) if other != folder]
    if others:
        return f"remove that folder and resume again; the newest other checkpoint is {others[-1]}"
    return "there is no other checkpoint; restart the run from scratch"


def faults(folder: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    """Returns a phrase for each file of `entries` that is missing, truncated or altered."""
    found = []
    for name, entry in entries.items():
        path = folder / name
        if path.is_file() and path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        else:
            found += part_faults(folder, parts_of(name, entry))
    return found


def part_faults(folder: Path, parts: Iterable[tuple[str, int, int, str]]) -> list[str]:
    """Returns a phrase for each part, (name, offset, bytes, sha256), that is missing, truncated or altered."""
    found = []
    for name, offset, size, digest in parts:
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size < offset + size:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {offset + size}")
        elif _sha256_of_part(path, offset, size) != digest:
            found.append(f"{name} has a different sha256 than when it was written")
    return list(dict.fromkeys(found))


@contextmanager
def understanding(folder: Path) -> Iterator[None]:
    """Wraps code that parses the files of a folder.

    Raises: CheckpointError, with the remedy, if their content is not as expected."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} has files whose content is not a checkpoint's ({type(error).__name__}: "
            f"{str(error)[:200]}); {remedy(folder)}"
        ) from error


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of a file."""
    return _sha256_of_part(path, 0, path.stat().st_size)


def _sha256_of_part(path: Path, offset: int, size: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(size, _READ_BYTES)))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size and (count := file.readinto(buffer[: min(size, len(buffer))])):
            digest.update(buffer[:count])
            size -= count
    return digest.hexdigest()
