"""Opens a model and a data set for a task: any format of `convert`, and whatever `data pack` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import user_cache
from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.data.writing.packed_sources import packed_source
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.evaluation.embed import embed_texts
from univitar_ds.formats.recognise import FORMATS, recognised
from univitar_ds.inference.embed_files import (
    ModelOptions,
    Opened,
    digest_of,
    model_folder,
    open_for_files,
    settings_of,
)
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.inference.reading import Reading
from univitar_ds.inference.workers import Setup, open_placed
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.peers.families import FAMILIES, model_type
from univitar_ds.tasks.feature_cache import PART_ROWS, Vectors
from univitar_ds.tasks.items import Items
from univitar_ds.tasks.peers import OpenedPeer, open_peer
from univitar_ds.tokenization import tokenizer_of


@dataclass(frozen=True)
class DataOptions:
    """A data set, as the options of `eval TASK` name it.

    `split`: of packed folders and of CLIP_benchmark's folders; `train_data`, `train_split`: of the items that probes
    learn from; `cache`: folder for what is packed.
    """

    data: str
    split: str = "test"
    train_data: str | None = None
    train_split: str = "train"
    class_names: str | None = None
    captions: str = "one"
    cache: Path | None = None


@dataclass(frozen=True)
class OpenedModel:
    """A model of this project, and how items are read for it. It is built on its device when it is first needed."""

    name: str
    found: Opened
    video_note = None

    @cached_property
    def model(self) -> UniViTARModel:
        return open_placed(self.found.stored, 0, self.found.setup.dtype)

    @property
    def reading(self) -> Reading:
        return self.found.setup.reading

    @property
    def nproc(self) -> int:
        return self.found.nproc

    def check_texts(self) -> None:
        """Raises: ConfigError if the model has no text tower."""
        if self.found.stored.joint is None:
            raise ConfigError(
                f"{self.name} has no text tower, which this task needs; name a run, its export/model or another whole "
                "model, or choose knn or linear"
            )

    def setup(self, *, texts: bool) -> Setup:
        """Returns how features are computed. `texts`: those of the joint space, else the pooled ones."""
        return replace(self.found.setup, kind="embedding" if texts else "pooled")

    def settings(self, setup: Setup, places: Sequence[SourceShard]) -> dict[str, Any]:
        """Returns what determines the features, see `feature_cache.FeatureModel`."""
        return settings_of(self.found.stored, setup, places, PART_ROWS, self._digest)

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.found.stored)

    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Returns the embeddings of sentences, (n, E) unit vectors float32 on the host."""
        return embed_texts(self.whole, self.tokenizer, sentences, self.model.joint.context_length)

    @property
    def whole(self) -> ContrastiveModel:
        """The two towers. Raises: ConfigError if the model has no text tower."""
        self.check_texts()
        assert isinstance(self.model.module, ContrastiveModel)
        return self.model.module

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        joint = self.model.joint
        return None if joint is None else tokenizer_of(joint.tokenizer)


def open_model(name: str, how: ModelOptions) -> OpenedModel | OpenedPeer:
    """Finds a model: one of this project in any format, or a peer. Raises: CheckpointError if it cannot be opened."""
    folder = model_folder(name, how)
    try:
        recognised(folder)
    except CheckpointError as error:
        kind = model_type(folder)
        if kind in FAMILIES:
            return open_peer(name, folder, kind, how)
        if kind is None:
            raise
        raise CheckpointError(
            f"{name} holds a {kind} model; supported are all formats of convert ({', '.join(FORMATS)}), and of "
            f"transformers {', '.join(FAMILIES)}"
        ) from error
    return OpenedModel(name, open_for_files(str(folder), how))


def test_source(options: DataOptions) -> SourceConfig:
    """Returns the source of the items that are scored. Folders and tables that are no shards are packed once."""
    return _source(options.data, options.split, options)


def probe_sources(options: DataOptions) -> tuple[SourceConfig, SourceConfig]:
    """Returns the source of the items that a probe learns from, and `test_source`.

    Raises: ConfigError if they are the same.
    """
    if (options.train_data or options.data, options.train_split) == (options.data, options.split):
        raise ConfigError(
            f"the probe would learn from the items that it is scored on ({options.data}, split {options.split}); name "
            "others by --train-split or --train-data"
        )
    return _source(options.train_data or options.data, options.train_split, options), test_source(options)


def _source(place: str, split: str, options: DataOptions) -> SourceConfig:
    path, names = place, options.class_names
    listed = os.path.join(place, "classnames.txt")
    if os.path.isfile(listed):  # CLIP_benchmark: FOLDER/classnames.txt, FOLDER/SPLIT/*.tar
        folder = os.path.join(place, split)
        if not os.path.isdir(folder):
            found = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
            raise ConfigError(f"{place} has no folder {split}, only {', '.join(found) or 'none'}; choose another split")
        path, names = folder, names or listed
    source = SourceConfig(path=path, split=split, class_names=names, captions=options.captions)
    return packed_source(source, options.cache or default_cache())


def default_cache() -> Path:
    """Returns the user's folder for data that is packed once."""
    return user_cache() / "data"


def features_cache(options: DataOptions) -> Path:
    """Returns the folder of the features that are kept."""
    return (options.cache or default_cache()) / "features"


@dataclass(frozen=True)
class Features:
    """Features of the n items of one modality that have a label: (n, D) float32 on the host."""

    values: Tensor
    labels: list[str]


def labelled_features(items: Items, found: Vectors) -> Features:
    """Returns the features of the items that have a label."""
    samples, values, _ = items.with_features(found)
    some = [row for row, sample in enumerate(samples) if sample.label is not None]
    return Features(values[some], [samples[row].label for row in some])
