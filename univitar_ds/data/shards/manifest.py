"""Reads manifest.json, which lists the shards of a packed folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import Storage
from univitar_ds.errors import DataError

MANIFEST = "manifest.json"
PROGRESS_FILE = ".pack.jsonl"
"""Progress log of `data pack`, from which an interrupted packing continues."""
VERSION = 1
_SHARD_FIELDS = {"file": str, "split": str, "kind": str, "samples": int, "bytes": int, "sha256": str}


def read_manifest(folder: str | Path, storage: Storage | None = None) -> dict[str, Any]:
    """Returns the manifest of a packed folder, with a checked list of shards. `storage`: None: `storage_for` the path.

    Raises: DataError if there is no manifest that this version can read.
    """
    path = os.path.join(folder, MANIFEST)
    storage = storage or storage_for(path)
    remedy = "pack the folder again: univitar-ds data pack FOLDER OUT"
    if not storage.exists(path):
        raise DataError(f"{folder} has no {MANIFEST}, so its packing did not end; {remedy}")
    try:
        manifest = json.loads(storage.read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise DataError(f"{path} has version {found}, this program reads {VERSION}; {remedy}")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise DataError(f"{path} has no valid list of shards; {remedy}")
    return manifest


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and all(isinstance(shard.get(name), kind) for name, kind in _SHARD_FIELDS.items())
        and Path(shard["file"]).name == shard["file"]
        and shard["kind"] in ("image", "video")
    )
