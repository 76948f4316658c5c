"""The data of a task: any source that `data pack` reads, and the folders of CLIP_benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import user_cache
from univitar_ds.data.shards.class_names import read_class_names
from univitar_ds.data.shards.listing import OR_REMOVE, place_of
from univitar_ds.data.shards.manifest import MANIFEST, read_manifest
from univitar_ds.data.shards.sources import SourceShard, find_shards
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import LOCAL, S3, Storage, StorageSettings
from univitar_ds.data.writing.packed_sources import packed_sources
from univitar_ds.errors import ConfigError, DataError

CLASS_NAMES = "classnames.txt"
"""File of class names in CLIP_benchmark's layout."""


@dataclass(frozen=True)
class DataOptions:
    """Options of `eval TASK` about the data set.

    `split`: of packed folders and of CLIP_benchmark's folders; `train_data`, `train_split`: of the items that probes
    are trained on; `train_data` None: `data`; `class_names`, `captions`: see `SourceConfig`; `cache`: folder for packed
    data and cached features, None: `default_cache`; `storage`: settings of the S3 store.
    """

    data: str
    split: str = "test"
    train_data: str | None = None
    train_split: str = "train"
    class_names: str | None = None
    captions: str = "one"
    cache: Path | None = None
    storage: StorageSettings = LOCAL


def test_source(options: DataOptions) -> SourceConfig:
    """Returns the source of the items that are scored. Folders and tables are packed into shards once."""
    return _packed([_Wanted("--split", options.data, options.split)], options)[0]


def class_list(options: DataOptions) -> tuple[str, ...]:
    """Returns the names of all classes of the data; empty if no file names them. Raises: DataError if it is damaged."""
    path = _source(_Wanted("--split", options.data, options.split), options).class_names
    return () if path is None else read_class_names(path, options.storage)


def probe_sources(options: DataOptions) -> tuple[SourceConfig, SourceConfig]:
    """Returns the source of the items that a probe is trained on, and `test_source`.

    Raises: ConfigError if both are the same items.
    """
    if (options.train_data or options.data, options.train_split) == (options.data, options.split):
        raise ConfigError(
            f"the probe would learn from the items that it is scored on ({options.data}, split {options.split}); name "
            "others with --train-split or --train-data"
        )
    learned = _Wanted("--train-split", options.train_data or options.data, options.train_split)
    train, test = _packed([learned, _Wanted("--split", options.data, options.split)], options)
    return train, test


def shards_of(source: SourceConfig, settings: StorageSettings) -> list[SourceShard]:
    """As `find_shards` for one source, with the remedies of a task instead of those of a run file."""
    try:
        return find_shards([source], settings)
    except DataError as error:
        raise DataError(str(error).replace(OR_REMOVE, "")) from error


class _Wanted(NamedTuple):
    """A split of a data set, and the option that names it."""

    option: str
    place: str
    split: str

    def missing(self, splits: Iterable[str]) -> ConfigError:
        """Returns the error for a split that is not one of `splits`."""
        found = ", ".join(sorted(splits))
        return ConfigError(
            f"{self.option} {self.split}: {self.place} has no split of this name; "
            + (f"it has {found}: give one of them" if found else "it has none; name other data")
        )


def _packed(wanted: Sequence[_Wanted], options: DataOptions) -> list[SourceConfig]:
    """Returns the sources of splits. Raises: ConfigError with the option if a folder lacks a split."""
    found = packed_sources([_source(one, options) for one in wanted], options.cache or default_cache())
    for one, source in zip(wanted, found, strict=True):
        storage = _storage_of_folder(source.path, options)
        if storage is not None and storage.exists(os.path.join(source.path, MANIFEST)):
            splits = {shard["split"] for shard in read_manifest(source.path, storage)["shards"]}
            if source.split not in splits:
                raise one.missing(splits)
    return found


def _source(wanted: _Wanted, options: DataOptions) -> SourceConfig:
    path, names = wanted.place, options.class_names
    storage = _storage_of_folder(path, options)
    if storage is not None and (splits := _splits_of_tars(path, storage)):
        if wanted.split not in splits:
            raise wanted.missing(splits)
        listed = os.path.join(path, CLASS_NAMES)
        path, names = splits[wanted.split], names or (listed if storage.exists(listed) else None)
    return SourceConfig(path=path, split=wanted.split, class_names=names, captions=options.captions)


def _storage_of_folder(path: str, options: DataOptions) -> Storage | None:
    """Returns the storage of a folder; None for files, for tars, which need no right to list, and for addresses of
    plugins. Raises: DataError for an s3:// address without a bucket."""
    if path.startswith(S3):
        place_of(SourceConfig(path=path))  # checks the bucket
    elif not os.path.isdir(path):
        return None
    return None if path.endswith(".tar") else storage_for(path, options.storage)


def _splits_of_tars(path: str, storage: Storage) -> dict[str, str]:
    """Returns the folders of a folder in CLIP_benchmark's layout, by name: FOLDER/SPLIT/*.tar, and for classification
    FOLDER/classnames.txt. Empty for any other: without that file, FOLDER itself must have no tars, and all folders must
    hold tars and texts alone."""
    names = _shown(storage.list(path))
    tars = any(name.endswith(".tar") for name in names)
    if MANIFEST in names or (tars and CLASS_NAMES not in names):
        return {}
    folders = _shown(storage.folders(path))
    if CLASS_NAMES in names or all(_holds_tars(folder, storage) for folder in folders.values()):
        return folders
    return {}


def _holds_tars(folder: str, storage: Storage) -> bool:
    """Whether a folder holds tars, and nothing else but texts."""
    ends = {os.path.splitext(name)[1] for name in _shown(storage.list(folder))}
    return ".tar" in ends and ends <= {".tar", ".txt", ".json", ".md"} and not storage.folders(folder)


def _shown(paths: Iterable[str]) -> dict[str, str]:
    """Returns paths by their name, without hidden ones."""
    return {name: path for path in paths if not (name := os.path.basename(path)).startswith(".")}


def default_cache() -> Path:
    """Returns the folder for packed data in the user's cache."""
    return user_cache() / "data"


def features_cache(options: DataOptions) -> Path:
    """Returns the folder of cached features."""
    return (options.cache or default_cache()) / "features"


def tokens_cache(options: DataOptions) -> Path:
    """Returns the folder of cached tokens."""
    return (options.cache or default_cache()) / "tokens"
