"""Opens a model and a data set for a task: any format of `convert`, and whatever `data pack` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import user_cache
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.writing.packed_sources import packed_source
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import Modality, token_count
from univitar_ds.inference.embed_files import ModelOptions, open_for_files
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.inference.reading import Reading
from univitar_ds.inference.workers import open_placed
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.screen import progress_bar
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
    """A model on its device, and how items are read for it."""

    name: str
    model: UniViTARModel
    reading: Reading

    @property
    def whole(self) -> ContrastiveModel:
        """The two towers. Raises: ConfigError if the model has no text tower."""
        if not isinstance(self.model.module, ContrastiveModel):
            raise ConfigError(
                f"{self.name} has no text tower, which this task needs; name a run, its export/model or another whole "
                "model, or choose knn or linear"
            )
        return self.model.module

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        joint = self.model.joint
        return None if joint is None else tokenizer_of(joint.tokenizer)

    def packs(self, source: SourceConfig, modality: Modality, *, texts: bool) -> Iterator[PackedBatch]:
        """Yields all items of a modality. `texts`: whether captions are encoded for the text tower."""
        with closing(
            eval_packs(
                [source],
                modality=modality,
                resolution=self.reading.encoder.resolution,
                video_frames=self.reading.frames,
                token_budget=self.reading.token_budget,
                tokenizer=self.tokenizer if texts else None,
                context_length=self.model.joint.context_length if texts else 1,
                data=self.reading.data,
            )
        ) as packs:
            yield from packs


def open_model(name: str, how: ModelOptions) -> OpenedModel:
    """Opens a model on the GPU, if there is one. Raises: CheckpointError if it cannot be opened."""
    opened = open_for_files(name, how)
    return OpenedModel(name, open_placed(opened.stored, 0, how.dtype), opened.setup.reading)


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


@dataclass(frozen=True)
class Features:
    """Features of the n items of one modality that have a label: (n, D) float32 on the host."""

    values: Tensor
    labels: list[str]


def features_of(opened: OpenedModel, source: SourceConfig, modality: Modality, *, progress: bool) -> Features:
    """Returns the pooled features of the encoder: by the attention pooling, or the mean of the tokens without one."""
    rows, labels = [torch.empty(0, opened.model.encoder.config.hidden_size)], []
    packs = opened.packs(source, modality, texts=False)
    with (
        torch.no_grad(),
        progress_bar(desc=f"{modality}s of {source.split}", unit=modality, disable=not progress) as bar,
    ):
        for pack in packs:
            some = [row for row, label in enumerate(pack.labels) if label is not None]
            if some:
                rows.append(_pooled(opened.model, pack)[some])
                labels += [pack.labels[row] for row in some]
            bar.update(len(pack))
    return Features(torch.cat(rows), labels)


def _pooled(model: UniViTARModel, pack: PackedBatch) -> Tensor:
    grids = [tuple(grid) for grid in pack.grid_thw.tolist()]
    lengths = [token_count(grid) for grid in grids]
    tokens = model.encoder(pack.pixels.to(model.device), grids, frames=pack.frames.tolist())
    return model.pool(tokens, lengths).float().cpu()
