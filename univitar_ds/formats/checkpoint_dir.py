"""Reads the folder of a run's checkpoints, which `training.checkpoint.atomic_dir` writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from univitar_ds.errors import CheckpointError
from univitar_ds.regular_files import read_utf8

MANIFEST = "manifest.json"
LATEST = "latest"


def complete(root: Path) -> list[Path]:
    """Returns the complete folders, oldest first."""
    folders = (folder for folder in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", folder.name))
    return sorted(folder for folder in folders if (folder / MANIFEST).is_file())


def latest(root: Path) -> Path | None:
    """Returns the folder in `latest`, or the newest complete folder if that one is missing; None without a folder."""
    if (root / LATEST).is_file():
        name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"step-\d{8,}", name) and (root / name).is_dir():
            return root / name
    folders = complete(root)
    return folders[-1] if folders else None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns {name: {bytes, sha256}} of the files of a complete folder.

    Raises: CheckpointError if the manifest is missing or cannot be read."""
    try:
        files = json.loads(read_utf8(folder / MANIFEST))["files"]
        return {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error}); {remedy(folder)}") from error


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
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            found.append(f"{name} has a different sha256 than when it was written")
    return found


@contextmanager
def understanding(folder: Path) -> Iterator[None]:
    """Wraps code that takes the content of a folder's files apart.

    Raises: CheckpointError, with the remedy, if the content is not as expected."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} has files with another content than a checkpoint's ({type(error).__name__}: "
            f"{str(error)[:200]}); {remedy(folder)}"
        ) from error


def sha256(path: Path) -> str:
    """Returns the hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
