"""Shards in memory, for tests of reading and of the sampler."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.support.shards import Sample, image
from univitar_ds.data.sampler.bad_samples import BadPolicy
from univitar_ds.data.sampler.cursor import ReadPosition, StreamCursor
from univitar_ds.data.sampler.lanes import Stream
from univitar_ds.data.sampler.reader import Reader
from univitar_ds.data.sampler.stream_config import StreamConfig
from univitar_ds.data.shards.samples import Sample as Read
from univitar_ds.data.shards.samples import SizeRule
from univitar_ds.data.shards.sources import EVERYTHING, SourceShard, groups_of
from univitar_ds.geometry import Modality, Resolution

START = ReadPosition()
tiny_image = functools.lru_cache(functools.partial(image, form="PNG"))
counts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda some: sum(some) > 0)
"""Numbers of samples per shard."""
wounds = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.99), st.booleans()), max_size=4)
"""(shard, position as a share of its bytes, whether to truncate there), for `damaged`."""


class MemoryStorage:
    """The storage interface over a dictionary; counts range reads and records prefetch hints."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges_read = self.bytes_read = 0
        self.hints: list[list[str]] = []

    def open(self, path: str) -> io.BytesIO:
        return io.BytesIO(self.files[path])

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.ranges_read += 1
        self.bytes_read += length
        return self.files[path][offset : offset + length]

    def read(self, path: str) -> bytes:
        return self.files[path]

    def size(self, path: str) -> int:
        return len(self.files[path])

    def exists(self, path: str) -> bool:
        return path in self.files

    def list(self, prefix: str) -> Sequence[str]:
        return sorted(path for path in self.files if path.startswith(prefix))

    def folders(self, prefix: str) -> Sequence[str]:
        return []

    def prefetch(self, paths: Sequence[str]) -> None:
        self.hints.append(list(paths))


def tar_bytes(samples: Sequence[Sample]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sized_sample(key: str, index: int, captions: int = 1) -> Sample:
    """A small image whose size varies with `index`, and a subset of the metadata that `data pack` writes."""
    height, width = 14 * (1 + index % 5), 14 * (1 + index // 5 % 4)
    about = {"kind": "image", "width": width, "height": height, "frames": 1}
    about["captions"] = [f"{key} {n}" for n in range(captions)]
    return key, {"png": tiny_image(height, width), "json": json.dumps(about).encode()}


def memory_shards(counts: Sequence[int], modality: Modality | None = "image", **options) -> list[SourceShard]:
    """One shard for each of `counts`, with that many images of 1 to 20 tokens.

    `options`: `captions`, the number of captions per sample; others as in `shards_of`.
    """
    captions = options.pop("captions", 1)
    contents = [[sized_sample(f"{s}-{i}", 7 * s + i, captions) for i in range(n)] for s, n in enumerate(counts)]
    return shards_of(contents, modality, **options)


def shards_of(
    contents: Sequence[Sequence[Sample]],
    modality: Modality | None = "image",
    *,
    sources: Sequence[str] | None = None,
    templates: Sequence[str] = (),
) -> list[SourceShard]:
    """A shard for each list of samples; `sources` are the names of their sources."""
    return raw_shards([tar_bytes(samples) for samples in contents], modality, sources=sources, templates=templates)


def raw_shards(
    contents: Sequence[bytes],
    modality: Modality | None = "image",
    *,
    sources: Sequence[str] | None = None,
    templates: Sequence[str] = (),
) -> list[SourceShard]:
    """A shard for each content, which need not be a valid tar."""
    storage = MemoryStorage()
    storage.files = {f"m{number}": content for number, content in enumerate(contents)}
    return [
        SourceShard(name, name, storage, len(content), modality, source=source, templates=tuple(templates))
        for (name, content), source in zip(storage.files.items(), sources or [""] * len(contents), strict=True)
    ]


def small_config(shards: Sequence[SourceShard], *, lanes: int = 1, seed: int = 0, **changed) -> StreamConfig:
    """Images of 1 to 20 tokens at their own size, 40 tokens per pack. 6 bad samples in a row are an error."""
    size = SizeRule(changed.pop("modality", "image"), Resolution(1, 20, 14), changed.pop("frames", 1), 40, 10**6)
    policy = BadPolicy("skip", 1000, changed.pop("max_bad_in_a_row", 5))
    fields = {"token_budget": 40, "pool_samples": 16, "policy": policy, **changed}
    return StreamConfig(shards=shards, lanes=lanes, seed=seed, size=size, **fields)


def keys(samples: Sequence[Read]) -> list[str]:
    """The keys of the samples."""
    return [sample.key for sample in samples]


def epoch_of(cursor: StreamCursor) -> int:
    """The epoch of the only group of a stage without weights."""
    return cursor.places[EVERYTHING].epoch


def packs_of(
    config: StreamConfig, lane: int, n: int, start: StreamCursor | None = None
) -> tuple[list[tuple[list[Read], dict[str, int]]], StreamCursor]:
    """The next `n` packs of a lane, each with its bad samples, and the cursor after them."""
    stream = Stream(config, lane, start or StreamCursor())
    return [stream.next_pack() for _ in range(n)], stream.cursor()


def reader_of(config: StreamConfig, lane: int, place: ReadPosition = START) -> Reader:
    """The reader of a lane that starts at `place`."""
    (group,) = groups_of(config.shards, "image", config.weights)
    return Reader(config, group, lane, place)


def damaged(sizes: Sequence[int], wounds: Sequence[tuple[int, float, bool]]) -> list[SourceShard]:
    """Shards with `sizes` samples, damaged: each of `wounds` zeroes a block of a shard or truncates it."""
    contents = [tar_bytes([sized_sample(f"{s}-{i}", 7 * s + i) for i in range(n)]) for s, n in enumerate(sizes)]
    for shard, share, cut in wounds:
        content = contents[shard % len(sizes)]
        at = int(share * len(content)) // 512 * 512
        contents[shard % len(sizes)] = content[:at] + (b"" if cut else bytes(512) + content[at + 512 :])
    return raw_shards(contents)
