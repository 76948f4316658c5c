"""Reads the texts of shards, and the captions on which a run trains its tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards import captions, tar_index
from univitar_ds.data.shards.samples import is_read
from univitar_ds.data.shards.sources import SourceShard, find_shards, spread
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.storage.parallel import AT_ONCE
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.errors import SampleError

CAPTION_SHARDS = 200
"""Maximum number of shards whose captions are read. A run with 11,000 remote shards then starts within a minute."""
CAPTION_BYTES = 4 << 30
"""Maximum bytes read for captions, about 40,000 samples of 100 kB; divided evenly among the shards."""


def iterate_captions(
    sources: Sequence[SourceConfig], *, limit: int, settings: StorageSettings = LOCAL
) -> Iterator[str]:
    """Yields up to about `limit` captions, equally many from each of at most `CAPTION_SHARDS` evenly spaced shards.

    The captions do not depend on the location of the shards. Samples with unusable texts are skipped.
    Raises: DataError as `find_shards` does, or if a shard cannot be read.
    """
    chosen = spread(find_shards(sources, settings), CAPTION_SHARDS)
    share = -(-limit // len(chosen))
    bytes_share = CAPTION_BYTES // len(chosen)
    by_path: dict[str, list[SourceShard]] = {}  # a shard in several sources is read by one thread
    for shard in chosen:
        by_path.setdefault(shard.path, []).append(shard)

    def read(copies: list[SourceShard]) -> list[str]:
        return [caption for shard in copies for caption in itertools.islice(_captions_of(shard, bytes_share), share)]

    with ThreadPoolExecutor(AT_ONCE) as readers:
        for found in readers.map(read, by_path.values()):
            yield from found


def _captions_of(shard: SourceShard, most_bytes: int) -> Iterator[str]:
    """Yields the captions of a shard in order, until `most_bytes` have been read."""
    ranges = RangeReader(shard.storage, shard.path, shard.size)
    for contents in texts_of(shard, ranges):
        with suppress(SampleError):
            said = captions.read_texts(contents, lines=shard.caption_lines)
            about = {"class_names": shard.class_names, "templates": shard.templates}
            yield from captions.resolve(said.captions, said.label, said.ignored, **about)[0]
        if ranges.fetched >= most_bytes:
            return


def texts_of(shard: SourceShard, ranges: RangeReader) -> Iterator[dict[str, bytes]]:
    """Yields the texts of each sample in the part of a shard that is read, as bytes by extension, for
    `captions.read_texts`. `ranges` reads the shard."""
    with ranges.buffered() as stream:
        for found in tar_index.scan(stream, shard.name, shard.size):
            if isinstance(found, tar_index.Damage):
                continue  # the training loader counts and reports damage
            if not is_read(stream, shard, found):
                continue
            yield {
                member.extension: _content(stream, member)
                for member in found.members
                if member.extension in captions.EXTENSIONS and member.length <= captions.BYTES_LIMIT
            }


def _content(stream: BinaryIO, member: tar_index.Member) -> bytes:
    stream.seek(member.offset)
    return stream.read(member.length)
