"""Reads numbers of samples and tokens per item from the manifests of a run's sources."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.shards.listing import place_of
from univitar_ds.data.shards.manifest import read_manifest
from univitar_ds.data.shards.sources import SourceShard, stage_modalities
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import UserError
from univitar_ds.geometry import Modality
from univitar_ds.planning.counts.batch import tokens_of_item
from univitar_ds.planning.counts.unpacked import UnpackedShard, histograms_of
from univitar_ds.planning.sizes import amount

Histogram = Mapping[str, int]
"""Number of items by the tokens of a frame: "64" or a range, "64-127"."""
_BUCKET = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MOST_ITEMS = 10**15
"""Maximum count in a histogram: a manifest with more is damaged."""


def source_lines(shards: Sequence[SourceShard], sources: Sequence[SourceConfig]) -> Iterator[str]:
    """Yields a line for each source: shards, bytes, and the samples of each modality if a manifest has them."""
    by_source: dict[int, list[SourceShard]] = {}
    for shard in shards:
        by_source.setdefault(id(shard.watch), []).append(shard)
    for source, own in zip(sources, by_source.values(), strict=False):  # none if a check of the sources failed
        counts: dict[str, int] = defaultdict(int)
        for shard in own:
            if shard.modality is not None and shard.expected is not None:
                counts[shard.modality] += shard.expected
        known = ", ".join(f"{count:,} {modality}s" for modality, count in sorted(counts.items()))
        size = sum(shard.size for shard in own)
        if isinstance(own[0], UnpackedShard):
            assert own[0].survey is not None
            yield (
                f"{source.path}: {own[0].survey.title}, about {known}; the run packs them when it starts, into about "
                f"{amount(size)} (from the listing and the headers of {len(own[0].survey.media)} files)"
            )
            continue
        known = known or "samples not counted (no manifest)"
        yield f"{source.path}: {len(own):,} shard{'s' if len(own) != 1 else ''}, {amount(size)}, {known}"


def expected_tokens(config: RunConfig, shards: Sequence[SourceShard]) -> dict[tuple[str, Modality], float]:
    """Returns the expected tokens per item by stage and modality, from the histograms in the manifests.

    A stage and modality are absent if a source that the stage reads has no histogram.
    """
    settings = StorageSettings.of(config.data)
    unpacked = histograms_of(shards)
    packed = [source for source in config.data.sources if source.label not in unpacked]
    histograms = unpacked | {source.label: _histograms(source, settings) for source in packed}
    found = {}
    for stage in config.stages:
        for modality in stage_modalities(stage):
            mean = _mean(stage, modality, shards, histograms)
            if mean is not None:
                found[stage.name, modality] = mean
    return found


def _histograms(source: SourceConfig, settings: StorageSettings) -> Mapping[str, Histogram]:
    """Returns the histograms of tokens of a frame by modality; {} if no manifest with histograms can be read."""
    with suppress(UserError, OSError):
        place = place_of(source)
        found = {} if place.endswith(".tar") else read_manifest(place, storage_for(place, settings))
        histograms = found.get("token_histogram")
        if not isinstance(histograms, dict):
            return {}
        return {name: one for name, one in histograms.items() if isinstance(one, dict)}
    return {}


def _mean(
    stage: StageConfig,
    modality: Modality,
    shards: Sequence[SourceShard],
    histograms: Mapping[str, Mapping[str, Histogram]],
) -> float | None:
    """Returns the mean tokens of an item over the sources that a stage reads; None if one has no histogram."""
    counts: dict[str, float] = defaultdict(float)
    for shard in shards:
        if shard.modality in (None, modality) and (not stage.weights or stage.weights.get(shard.source)):
            counts[shard.source] += shard.expected or 0
    total, weight = 0.0, 0.0
    for name, count in counts.items():
        mean = _mean_of(stage, modality, histograms.get(name, {}).get(modality, {}))
        if mean is None:
            return None
        share = stage.weights.get(name, 0.0) if stage.weights else count
        total, weight = total + share * mean, weight + share
    return total / weight if weight else None


def _mean_of(stage: StageConfig, modality: Modality, histogram: Histogram) -> float | None:
    """Returns the mean tokens of an item, with each bucket at its geometric mean; None if the histogram is empty or
    damaged."""
    total, items = 0.0, 0
    for bucket, count in histogram.items():
        sides = _BUCKET.fullmatch(str(bucket))
        if sides is None or not isinstance(count, int) or not 0 <= count < _MOST_ITEMS:
            return None
        first, last = sides.groups()
        frame = (int(first) * int(last or first)) ** 0.5
        total, items = total + count * tokens_of_item(stage, modality, frame), items + count
    return total / items if items else None
