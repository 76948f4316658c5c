"""Builds the manifest of a packed folder: counts and histograms of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from univitar_ds.data.importing.rows import Row
from univitar_ds.data.shards.manifest import VERSION
from univitar_ds.data.writing.examine import MediaInfo
from univitar_ds.geometry import PATCH


def build_manifest(
    samples: Sequence[tuple[Row, MediaInfo]],
    shards: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    fingerprint: str,
) -> dict[str, Any]:
    """Returns the manifest: shards, skipped files, and counts and histograms of the samples.

    Tokens are those of a frame at native size: pixels / 196. The buckets of a histogram are named by their first and
    last value.
    """
    counts: dict[str, Counter[str]] = {}
    labels: dict[str, Counter[str]] = {}
    for row, info in samples:
        counts.setdefault(row.split, Counter())[info.kind] += 1
        if row.label is not None:
            labels.setdefault(row.split, Counter())[row.label] += 1
    kinds = sorted({info.kind for _, info in samples})
    of_kind = {kind: [info for _, info in samples if info.kind == kind] for kind in kinds}
    return {
        "version": VERSION,
        "fingerprint": fingerprint,
        "counts": {split: dict(sorted(counts[split].items())) for split in sorted(counts)},
        "captions": sum(len(row.captions) for row, _ in samples),
        "shards": shards,
        "long_side_px_histogram": {
            kind: _histogram(max(info.height, info.width) for info in of_kind[kind]) for kind in kinds
        },
        "token_histogram": {
            kind: _histogram(round(info.height * info.width / PATCH**2) for info in of_kind[kind]) for kind in kinds
        },
        "labels": {split: dict(sorted(labels[split].items())) for split in sorted(labels)},
        "skipped": skipped,
    }


def _histogram(values: Iterable[int]) -> dict[str, int]:
    """Returns counts in buckets of doubling size: 0, 1, 2-3, 4-7, ..."""
    counts = Counter(value.bit_length() for value in values)
    names = {bits: f"{1 << bits - 1}-{(1 << bits) - 1}" if bits > 1 else str(bits) for bits in counts}
    return {names[bits]: counts[bits] for bits in sorted(counts)}
