"""Which shards a run reads: the sources of its configuration, looked up and checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from univitar_ds.config.schema import SourceConfig, StageConfig
from univitar_ds.data import captions, tar
from univitar_ds.data.layout import Modality
from univitar_ds.data.listing import PACK_HINT, Shard, list_shards
from univitar_ds.errors import DataError, SampleError


def stage_modalities(stage: StageConfig) -> set[Modality]:
    """What a stage reads."""
    used: dict[Modality, bool] = {"image": stage.video_ratio < 1, "video": stage.video_ratio > 0}
    return {modality for modality, wanted in used.items() if wanted}


def validate_sources(sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> list[Shard]:
    """All shards of the sources in reading order, after checking that every modality of the stages has some.

    Cheap (names and sizes only); call it before starting processes.
    Raises: DataError if a source has no shard, lacks its split, has a missing or cut shard, or nothing at all
    holds one of the modalities.
    """
    shards = find_shards(sources)
    for modality in sorted(set().union(*map(stage_modalities, stages))):
        if not of_modality(shards, modality):
            present = sorted({shard.modality for shard in shards if shard.modality})
            raise DataError(
                f"the run needs {modality} samples, but the sources ({', '.join(s.path for s in sources)}) hold only "
                f"{' and '.join(present)} samples; add a source with {modality} samples or set video_ratio "
                f"to {0 if modality == 'video' else 1} in every stage"
            )
    return shards


def find_shards(sources: Sequence[SourceConfig]) -> list[Shard]:
    """All shards of the sources, each source's in the order of its manifest or of the names.

    Shard names carry the position of their source when there are several, so that keys stay unique.
    Raises: DataError.
    """
    found = []
    for position, source in enumerate(sources):
        prefix = f"{position}:" if len(sources) > 1 else ""
        shards = list_shards(source, prefix)
        if not shards:
            raise DataError(f"source {source.path}: no shard found (*.tar); {PACK_HINT}")
        found += shards
    return found


def of_modality(shards: Sequence[Shard], modality: Modality) -> list[int]:
    """Indices of the shards that may hold samples of this modality."""
    return [index for index, shard in enumerate(shards) if shard.modality in (None, modality)]


def fingerprint(shards: Iterable[Shard]) -> str:
    """Identity of the data: names, sizes and, where a manifest has them, hashes of all shards in order."""
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        state.update(f"{shard.name}\0{shard.size}\0{shard.sha256 or ''}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def iterate_captions(sources: Sequence[SourceConfig], *, limit: int) -> Iterator[str]:
    """Up to about `limit` captions, as many from each shard; samples whose texts are unreadable have none.

    Raises: DataError as `find_shards` does, or for a damaged shard.
    """
    shards = find_shards(sources)
    share = -(-limit // len(shards))
    for shard in shards:
        yield from itertools.islice(_captions_of(shard), share)


def _captions_of(shard: Shard) -> Iterator[str]:
    with shard.storage.open(shard.path) as stream:
        for group in tar.groups(stream, shard.name, shard.size):
            texts = {
                member.extension: shard.storage.read_range(shard.path, member.offset, member.length)
                for member in group.members
                if member.extension in captions.EXTENSIONS and member.length <= captions.BYTES_LIMIT
            }
            with suppress(SampleError):
                yield from captions.read_texts(texts).captions
