"""Checks before the first step that each source of a run has texts that its objective can use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.caption_texts import texts_of
from univitar_ds.data.shards import captions
from univitar_ds.data.shards.listing import INIT_HINT
from univitar_ds.data.shards.sources import SourceShard, spread
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.errors import DataError, SampleError

SHARDS, BYTES = 64, 256 << 20
"""Maximum numbers of shards of a source, and of bytes in them, that are searched for a usable text. The first sample
usually has one."""
_CAPTIONS = 'if it has labels, set templates: ["a photo of a {}"] in the source, or objective.kind=classification'
_LABELS = "leave the source out, or give its samples labels (in .json or .cls)"


def check_texts(config: RunConfig, shards: Sequence[SourceShard]) -> None:
    """Checks the shards of training. Raises: DataError that names all sources without usable texts."""
    if faults := faults_of_texts(config, shards):
        raise DataError("; ".join(faults))


def faults_of_texts(config: RunConfig, shards: Sequence[SourceShard]) -> list[str]:
    """Returns an error message for each source without a sample that the objective can use.

    A classifier needs a label, other objectives need a caption. There are no messages if `data.max_bad_per_thousand`
    allows every sample to be bad.

    Raises: DataError if a shard cannot be read.
    """
    by_source: dict[int, list[SourceShard]] = {}
    for shard in shards:
        by_source.setdefault(id(shard.watch), []).append(shard)
    if config.data.max_bad_per_thousand >= 1000:
        return []
    classifies = config.objective.classifies
    faults = []
    for some in by_source.values():
        looked = _unusable(some, classifies)
        if looked:
            faults.append(nothing_usable(some[0].source, looked, classifies))
    return faults


def nothing_usable(source: str, looked: int, classifies: bool) -> str:
    """Returns the error message for a source of which none of `looked` samples can be used."""
    needs = "objective.kind classification needs labels" if classifies else "a contrastive run needs captions"
    remedy = _LABELS if classifies else _CAPTIONS
    samples = f"{looked:,} sample{'s' if looked > 1 else ''}"
    return f"source {source}: {needs}, and none was found in {samples}; {remedy}; {INIT_HINT}"


def _unusable(shards: Sequence[SourceShard], classifies: bool) -> int:
    """Returns the number of samples that were read if none can be used; 0 if one can, or there are none."""
    chosen, samples = spread(shards, SHARDS), 0
    for shard in chosen:
        ranges = RangeReader(shard.storage, shard.path, shard.size)
        for contents in texts_of(shard, ranges):
            samples += 1
            if _usable(shard, contents, classifies):
                return 0
            if ranges.fetched >= BYTES // len(chosen):
                break
    return samples


def _usable(shard: SourceShard, contents: Mapping[str, bytes], classifies: bool) -> bool:
    with suppress(SampleError):
        said = captions.read_texts(contents, lines=shard.caption_lines)
        about = {"class_names": shard.class_names, "templates": None if classifies else shard.templates}
        found, label, _ = captions.resolve(said.captions, said.label, said.ignored, **about)
        return label is not None if classifies else bool(found)
    return False
