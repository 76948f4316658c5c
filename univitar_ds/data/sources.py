"""Which shards a run reads: the sources of its configuration, looked up and checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import NamedTuple

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data import captions, tar
from univitar_ds.data.layout import Modality
from univitar_ds.data.listing import PACK_HINT, Shard, list_shards
from univitar_ds.data.mixture import shares_of
from univitar_ds.data.storage import LOCAL, StorageSettings
from univitar_ds.errors import DataError, SampleError

EVERYTHING = ""
"""Name of the only group where a stage has no weights: all shards of all sources."""


@dataclass(frozen=True)
class SourceShard(Shard):
    """A shard of a run's source: what `stages.N.weights` calls the source, and its captions for bare labels."""

    source: str = ""
    templates: tuple[str, ...] = ()


class ShardGroup(NamedTuple):
    """Shards that are read as one: each of their samples once in an epoch of the group's own.

    `shards` are indices into the run's shards, `share` is in millionths of the samples.
    """

    name: str
    share: int
    shards: tuple[int, ...]


def stage_modalities(stage: StageConfig) -> set[Modality]:
    """What a stage reads."""
    used: dict[Modality, bool] = {"image": stage.video_ratio < 1, "video": stage.video_ratio > 0}
    return {modality for modality, wanted in used.items() if wanted}


def validate_sources(
    sources: Sequence[SourceConfig], stages: Sequence[StageConfig], settings: StorageSettings = LOCAL
) -> list[SourceShard]:
    """All shards of the sources in reading order, after checking that every modality of every stage has some.

    Cheap (names and sizes only); call it before starting processes.
    Raises: DataError if a source has no shard, lacks its split, has a missing or cut shard, or nothing that a stage
    reads holds one of its modalities.
    """
    shards = find_shards(sources, settings)
    for stage in stages:
        for modality in sorted(stage_modalities(stage)):
            if not groups_of(shards, modality, stage.weights):
                raise _lacking(shards, sources, stage, modality)
    return shards


def find_shards(sources: Sequence[SourceConfig], settings: StorageSettings = LOCAL) -> list[SourceShard]:
    """All shards of the sources, each source's in the order of its manifest or of the names.

    Shard names carry the position of their source when there are several, so that keys stay unique.
    Raises: DataError.
    """
    found = []
    for position, source in enumerate(sources):
        prefix = f"{position}:" if len(sources) > 1 else ""
        shards = list_shards(source, prefix, settings)
        if not shards:
            raise DataError(f"source {source.path}: no shard found (*.tar); {PACK_HINT}")
        found += [_of_source(shard, source) for shard in shards]
    return found


def of_modality(shards: Sequence[Shard], modality: Modality) -> list[int]:
    """Indices of the shards that may hold samples of this modality."""
    return [index for index, shard in enumerate(shards) if shard.modality in (None, modality)]


def groups_of(shards: Sequence[SourceShard], modality: Modality, weights: Mapping[str, float]) -> list[ShardGroup]:
    """The groups that a stage with these weights reads for a modality, in the order of the sources.

    A source without a weight, or with weight 0, is left out; one without the modality drops out and the others share
    what is left. No weights at all: one group of everything.
    """
    indices = of_modality(shards, modality)
    if not weights:
        return [ShardGroup(EVERYTHING, 1, tuple(indices))] if indices else []
    by_source: dict[str, list[int]] = {}
    for index in indices:
        by_source.setdefault(shards[index].source, []).append(index)
    shares = shares_of({name: weights.get(name, 0.0) for name in by_source})
    return [ShardGroup(name, share, tuple(by_source[name])) for name, share in shares.items()]


def fingerprint(shards: Iterable[Shard]) -> str:
    """Identity of the data: names, sizes and, where a manifest has them, hashes of all shards in order.

    Not where they lie: the data may move.
    """
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        state.update(f"{shard.name}\0{shard.size}\0{shard.sha256 or ''}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def iterate_captions(
    sources: Sequence[SourceConfig], *, limit: int, settings: StorageSettings = LOCAL
) -> Iterator[str]:
    """Up to about `limit` captions, as many from each shard; samples whose texts are unreadable have none.

    Raises: DataError as `find_shards` does, or if a shard cannot be read.
    """
    shards = find_shards(sources, settings)
    share = -(-limit // len(shards))
    for shard in shards:
        yield from itertools.islice(_captions_of(shard), share)


def _of_source(shard: Shard, source: SourceConfig) -> SourceShard:
    known = {part.name: getattr(shard, part.name) for part in fields(Shard)}
    return SourceShard(**known, source=source.label, templates=tuple(source.templates))


def _lacking(
    shards: Sequence[SourceShard], sources: Sequence[SourceConfig], stage: StageConfig, modality: Modality
) -> DataError:
    remedy = f"set its video_ratio to {0 if modality == 'video' else 1}"
    if of_modality(shards, modality):
        named = ", ".join(name for name, weight in stage.weights.items() if weight > 0)
        return DataError(
            f"stage {stage.name} needs {modality} samples, but the sources that its weights name ({named}) hold none; "
            f"give a source with {modality} samples a weight or {remedy}"
        )
    present = sorted({shard.modality for shard in shards if shard.modality})
    return DataError(
        f"stage {stage.name} needs {modality} samples, but the sources ({', '.join(s.path for s in sources)}) hold "
        f"only {' and '.join(present)} samples; add a source with {modality} samples or {remedy}"
    )


def _captions_of(shard: SourceShard) -> Iterator[str]:
    with shard.storage.open(shard.path) as stream:
        for found in tar.scan(stream, shard.name, shard.size):
            if isinstance(found, tar.Damage):
                continue  # training counts and reports it
            texts = {
                member.extension: shard.storage.read_range(shard.path, member.offset, member.length)
                for member in found.members
                if member.extension in captions.EXTENSIONS and member.length <= captions.BYTES_LIMIT
            }
            with suppress(SampleError):
                said = captions.read_texts(texts)
                yield from captions.captions_of(said.captions, said.label, shard.templates)
