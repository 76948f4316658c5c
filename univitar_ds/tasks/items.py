"""The items of a source: texts and labels, which are read without pixels, and their cached features."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.media.prober import MediaAddress
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.sampler.reader import numbered, read_entries
from univitar_ds.data.shards.index_cache import shard_samples
from univitar_ds.data.shards.samples import Sample, SizeRule
from univitar_ds.data.shards.sources import SourceShard, of_modality
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import SampleError
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.zero_shot import Texts
from univitar_ds.geometry import MODALITIES, TUBELET, Modality, Resolution
from univitar_ds.inference.reading import LeftOut
from univitar_ds.tasks.cached.feature_cache import Vectors
from univitar_ds.tasks.sources import shards_of
from univitar_ds.tokenization import caption_id


@dataclass(frozen=True)
class Items:
    """The samples of one modality that have a caption or a label. `bad` counts the others, by kind of fault."""

    modality: Modality
    samples: list[Sample]
    bad: Counter[str] = field(default_factory=Counter)

    @property
    def labels(self) -> list[str]:
        """Labels of the samples that have one."""
        return [sample.label for sample in self.samples if sample.label is not None]

    def with_rows(
        self, keys: Sequence[str], left_out: Sequence[LeftOut]
    ) -> tuple[list[Sample], list[int], Counter[str]]:
        """Returns the n samples that have features, the row of each in the features, and the number of samples that
        were left out, by kind. Of several items with one key all are left out, unless each has features.

        Args: keys: of the rows of the features; left_out: items that could not be read."""
        rows: dict[str, deque[int]] = defaultdict(deque)
        for row, key in enumerate(keys):
            rows[key].append(row)
        described = Counter(sample.name for sample in self.samples)
        unread = Counter(one.key for one in left_out)
        bad = self.bad + Counter(one.kind for one in left_out if one.key in described)
        for name, count in described.items():  # shards may repeat a key: which of its items has a row is unknown
            if rows[name] and (name in unread or len(rows[name]) != count):
                bad["repeated_key"] += max(count - unread[name], 0)
                rows[name].clear()
        kept = [(sample, rows[sample.name].popleft()) for sample in self.samples if rows[sample.name]]
        return [sample for sample, _ in kept], [row for _, row in kept], bad

    def with_features(self, found: Vectors) -> tuple[list[Sample], torch.Tensor, Counter[str]]:
        """As `with_rows`, with the features (n, D) in place of their rows."""
        samples, rows, bad = self.with_rows(found.keys, found.left_out)
        return samples, found.values[rows], bad

    def embeddings(self, found: Vectors, texts: Texts | None) -> Embeddings:
        """Returns the embeddings of items and captions in the joint space.

        Args: found: features in that space; texts: embeds captions; None: the text embeddings stay zero."""
        samples, values, bad = self.with_features(found)
        captions = [sample.caption for sample in samples]
        vision = F.normalize(values, dim=-1)
        text = torch.zeros_like(vision)
        given = dict.fromkeys(caption for caption in captions if caption)
        if texts is not None and given:
            vectors = dict(zip(given, texts(list(given)), strict=True))
            for row, caption in enumerate(captions):
                if caption:
                    text[row] = vectors[caption]
        return Embeddings(
            vision,
            text,
            captions,
            [caption_id(caption) for caption in captions],
            [sample.label for sample in samples],
            [sample.set for sample in samples],
            [sample.name for sample in samples],
            self.modality,
            [sample.other_captions for sample in samples],
            bad,
        )


@dataclass(frozen=True)
class _AnySize(SizeRule):
    """A size rule that accepts every item, since sizes are not read."""

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        return 1, 1, 1

    def shrinks(self, height: int, width: int, grid: tuple[int, int, int]) -> bool:
        return False


def read_items(source: SourceConfig, settings: StorageSettings) -> list[Items]:
    """Returns the items of each modality, in the order of the shards, with class names and all captions.

    Sizes of media are not read.
    Raises: DataError as `shards_of`, or if a shard cannot be read.
    """
    shards = shards_of(source, settings)
    return [_items(shards, modality) for modality in MODALITIES]


def _items(shards: Sequence[SourceShard], modality: Modality) -> Items:
    rule = _AnySize(modality, Resolution(1, 1), TUBELET, 1, 1 << 62, max_video_s=float("inf"))

    def unknown(media: Sequence[MediaAddress]) -> list[MediaSize | SampleError]:
        return [MediaSize(modality, 1, 1, 1) for _ in media]

    items = Items(modality, [])
    for index in of_modality(shards, modality):
        entries = numbered(shard_samples(shards[index], modality))
        for _, _, found in read_entries(shards[index], entries, rule, unknown, label_is_enough=True):
            if isinstance(found, SampleError):
                items.bad[found.kind] += 1
            else:
                items.samples.append(found)
    return items
