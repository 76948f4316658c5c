"""The shards of a run's sources as JSON: rank 0 lists the sources, and the other ranks build the same shards from it.

If hundreds of ranks listed the sources, a store would throttle their requests.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from typing import Any

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.listing import Shard, place_of
from univitar_ds.data.shards.sources import SourceShard, of_source
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import DataError

_FIELDS = ("name", "path", "size", "modality", "sha256", "samples")


def listing_of(shards: Sequence[SourceShard]) -> list[dict[str, Any]]:
    """Returns an entry for each source, in order. Args: shards: result of `find_shards` or `validate_sources`."""
    return [
        {"class_names": own[0].class_names, "shards": [[getattr(shard, name) for name in _FIELDS] for shard in own]}
        for own in _by_source(shards)
    ]


def shards_of(
    listing: Sequence[dict[str, Any]], sources: Sequence[SourceConfig], settings: StorageSettings
) -> list[SourceShard]:
    """Returns the shards in a `listing_of` the same sources by another rank. Sends no requests."""
    found: list[SourceShard] = []
    for entry, source in zip(listing, sources, strict=True):
        storage = storage_for(place_of(source), settings)
        rows = [dict(zip(_FIELDS, row, strict=True)) for row in entry["shards"]]
        found += of_source([Shard(storage=storage, **row) for row in rows], source, settings, entry["class_names"])
    return found


def check_reachable(shards: Sequence[SourceShard], rank: int) -> None:
    """Compares one shard of each source, a different one on each rank, with the listing of rank 0.

    Raises: DataError if this machine cannot reach a shard or finds another size.
    """
    chosen = [own[rank % len(own)] for own in _by_source(shards)]
    for fault in at_once(lambda shard: _fault(shard, rank), chosen, [shard.storage for shard in chosen]):
        if fault is not None:
            raise fault


def _fault(shard: SourceShard, rank: int) -> DataError | None:
    remedy = f"all ranks must see the same data.sources: mount the source on {platform.node()} as on rank 0's machine"
    try:
        size = shard.storage.size(shard.path)
    except DataError as error:
        return DataError(f"rank {rank}: {error}; rank 0 has listed it, and {remedy}")
    if size == shard.size:
        return None
    return DataError(f"rank {rank}: {shard.path} has {size} bytes here and {shard.size} on rank 0; {remedy}")


def _by_source(shards: Sequence[SourceShard]) -> list[list[SourceShard]]:
    """Returns the shards of each source, which share their `watch`."""
    return [list(own) for _, own in itertools.groupby(shards, key=lambda shard: id(shard.watch))]
