"""The data of a task: whatever `data pack` reads, and the folders of CLIP_benchmark."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import user_cache
from univitar_ds.data.writing.packed_sources import packed_source
from univitar_ds.errors import ConfigError


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
