"""manifest.json: what a packed folder holds, for people and for the loader."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from univitar_ds.data.examine import Finding
from univitar_ds.data.folder import Row
from univitar_ds.data.storage import Storage, storage_for
from univitar_ds.errors import DataError
from univitar_ds.geometry import PATCH

MANIFEST = "manifest.json"
VERSION = 1
_SHARD_FIELDS = {"file": str, "split": str, "kind": str, "samples": int, "bytes": int, "sha256": str}


def read_manifest(folder: str | Path, storage: Storage | None = None) -> dict[str, Any]:
    """The manifest of a packed folder, its shard list checked; `storage` where the folder is not local.

    Raises: DataError if there is none, or none that this version can read.
    """
    path = os.path.join(folder, MANIFEST)
    storage = storage or storage_for(path)
    remedy = "pack the folder again: univitar-ds data pack FOLDER OUT"
    if not storage.exists(path):
        raise DataError(f"{folder} has no {MANIFEST}, its packing never ended; {remedy}")
    try:
        manifest = json.loads(storage.read(path))
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        found = manifest.get("version") if isinstance(manifest, dict) else None
        raise DataError(f"{path} has version {found}, this program reads {VERSION}; {remedy}")
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise DataError(f"{path} has no sound list of shards; {remedy}")
    return manifest


def build_manifest(
    samples: Sequence[tuple[Row, Finding]],
    shards: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    fingerprint: str,
) -> dict[str, Any]:
    """Counts and histograms of what was packed. Tokens are those of a frame at native size: pixels / 196.

    The buckets of a histogram are named by their first and last value.
    """
    counts: dict[str, Counter[str]] = {}
    labels: dict[str, Counter[str]] = {}
    for row, finding in samples:
        counts.setdefault(row.split, Counter())[finding.kind] += 1
        if row.label is not None:
            labels.setdefault(row.split, Counter())[row.label] += 1
    kinds = sorted({finding.kind for _, finding in samples})
    of_kind = {kind: [finding for _, finding in samples if finding.kind == kind] for kind in kinds}
    return {
        "version": VERSION,
        "fingerprint": fingerprint,
        "counts": {split: dict(sorted(counts[split].items())) for split in sorted(counts)},
        "captions": sum(len(row.captions) for row, _ in samples),
        "shards": shards,
        "long_side_px_histogram": {
            kind: _histogram(max(finding.height, finding.width) for finding in of_kind[kind]) for kind in kinds
        },
        "token_histogram": {
            kind: _histogram(round(finding.height * finding.width / PATCH**2) for finding in of_kind[kind])
            for kind in kinds
        },
        "labels": {split: dict(sorted(labels[split].items())) for split in sorted(labels)},
        "skipped": skipped,
    }


def _histogram(values: Iterable[int]) -> dict[str, int]:
    """Counts in buckets that double: 0, 1, 2-3, 4-7, ..."""
    counts = Counter(value.bit_length() for value in values)
    names = {bits: f"{1 << bits - 1}-{(1 << bits) - 1}" if bits > 1 else str(bits) for bits in counts}
    return {names[bits]: counts[bits] for bits in sorted(counts)}


def _is_shard(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and all(isinstance(shard.get(name), kind) for name, kind in _SHARD_FIELDS.items())
        and Path(shard["file"]).name == shard["file"]
        and shard["kind"] in ("image", "video")
    )
