"""Reads the labels of the sources of a classification run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.caption_texts import texts_of
from univitar_ds.data.shards import captions
from univitar_ds.data.shards.sources import SourceShard, find_shards, spread
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.storage.parallel import AT_ONCE
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.errors import SampleError

NAMED_SHARDS, NAMED_SAMPLES = 64, 256
"""Numbers of evenly spaced shards, and of samples in each, that are read for the names of data sets from a source with
class names."""


def iterate_labels(
    sources: Sequence[SourceConfig], settings: StorageSettings = LOCAL
) -> Iterator[tuple[str | None, str]]:
    """Yields pairs (data set, label) of all samples. A pair may occur several times.

    If a source has `class_names`, all of them are its labels, and some of its samples are read for the data sets. Of
    another source all samples are read, since any may have a new label. Damaged and unusable texts are skipped.

    Raises: DataError as `find_shards` does, or if a shard cannot be read.
    """
    shards = find_shards(sources, settings)
    plain = [shard for shard in shards if not shard.class_names]
    by_names: dict[tuple[str, ...], list[SourceShard]] = {}
    for shard in shards:
        if shard.class_names:
            by_names.setdefault(shard.class_names, []).append(shard)
    with ThreadPoolExecutor(AT_ONCE) as readers:
        for found in readers.map(_labels_of, plain):
            yield from found
        for names, some in by_names.items():
            first = spread(some, NAMED_SHARDS)
            parts = readers.map(lambda shard: _labels_of(shard, NAMED_SAMPLES), first)
            sets = {name for found in parts for name, _ in found} or {None}
            yield from ((name, label) for name in sets for label in names)


def _labels_of(shard: SourceShard, most: int | None = None) -> set[tuple[str | None, str]]:
    """Returns the pairs of set and label of a shard's first `most` samples (None: of all)."""
    pairs: set[tuple[str | None, str]] = set()
    texts = texts_of(shard, RangeReader(shard.storage, shard.path, shard.size))
    for contents in itertools.islice(texts, most):
        with suppress(SampleError):
            said = captions.read_texts(contents, lines=shard.caption_lines)
            about = {"class_names": shard.class_names, "templates": None}
            label = captions.resolve(said.captions, said.label, said.ignored, **about)[1]
            if label is not None:
                pairs.add((said.set, label))
    return pairs
