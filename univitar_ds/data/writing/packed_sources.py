"""Packs the sources of a run that are not shards, such as folders and tables, in any form that `data pack` reads.

A source is packed once, into a folder that is named after a fingerprint of the source. After a change of the source, it
is packed into another folder. So the change does not affect runs that read the first folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.importing import from_plugins
from univitar_ds.data.importing.recognise import format_of, known_formats, read_source
from univitar_ds.data.importing.rows import Listing, ReadOptions
from univitar_ds.data.shards.hold_out import check_splits
from univitar_ds.data.shards.listing import COMPRESSED, PACKED_SOURCES, place_of
from univitar_ds.data.shards.manifest import MANIFEST, PROGRESS_FILE, read_manifest
from univitar_ds.data.writing.progress_log import InUseError, wait_until_free
from univitar_ds.data.writing.writer import PackOptions, pack_folder
from univitar_ds.errors import DataError, StorageError, writing

_log = logging.getLogger(__name__)
_KEYS = {
    "--image-key": "table.image_key",
    "--caption-key": "table.caption_keys",
    "--label-key": "table.label_key",
    "--split-key": "table.split_key",
    "--images": "table.images",
    "--class-names": "class_names",
    "--hold-out": "hold_out",
}
"""Maps options of `data pack` to the keys of a source in the run file that have the same meaning."""
ReadSource = Callable[[str, ReadOptions], Listing]
"""Returns the listing of a source, as `read_source` and `survey.Surveys.listing`."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")


def all_are_shards(config: RunConfig) -> bool:
    """Whether all sources of the run are shards, so that none has to be packed."""
    return all(format_to_pack(source) is None for source in (*config.data.sources, *config.evaluation.sources))


def with_packed_sources(
    config: RunConfig, *, training: bool = True, pack: bool = True, read: ReadSource = read_source
) -> RunConfig:
    """Packs sources that are not shards. Returns the configuration with the packed folders as their paths.

    The folders are in `data.cache.folder`, or in the folder `output` if the cache has none. All ranks must be able to
    read them. Call this in one process, before the others start. A source keeps its name in `stages.N.weights`.

    Args: training: whether `data.sources` are packed too, or only `evaluation.sources`; pack: whether sources may be
        packed now; if not, those that were not packed before stay as they are; read: lists a source.
    Raises: DataError if a source cannot be read or packed (see `writer.pack_folder`), with its key in the run file;
        StorageError if the folder cannot be written.
    """
    packer = _Packer(Path(config.data.cache.folder or config.output, PACKED_SOURCES).absolute(), pack, read)
    if training:
        sources = _packed(config.data.sources, packer, "data.sources")
        config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
    sources = _packed(config.evaluation.sources, packer, "evaluation.sources")
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sources": sources})})


def _packed(sources: Sequence[SourceConfig], packer: _Packer, key: str) -> list[SourceConfig]:
    found = []
    for number, source in enumerate(sources):
        try:
            if format_to_pack(source) is None and source.table is not None:
                raise DataError(
                    f"{source.path} is not a table on this machine; check the path, or remove {key}.{number}.table"
                )
            found.append(packer.packed(source))
        except DataError as error:
            raise DataError(f"{key}.{number}: {in_run_file(str(error), f'{key}.{number}')}") from error
    return found


def packed_sources(sources: Sequence[SourceConfig], folder: Path) -> list[SourceConfig]:
    """Packs sources that come from no run file, below `folder`, and otherwise as `with_packed_sources`.

    Returns: all sources, with the packed folders as their paths.
    Raises: DataError if a source cannot be read or packed; StorageError if the folder cannot be written.
    """
    packer = _Packer((folder / PACKED_SOURCES).absolute(), True, read_source)
    return [packer.packed(source) for source in sources]


def in_run_file(text: str, place: str) -> str:
    """Returns a message in which the keys of a source replace the options of `data pack`.

    Args: place: key of the source in the run file, such as "data.sources.0".
    """
    for option, key in _KEYS.items():
        text = text.replace(option, f"{place}.{key}")
    return text


def format_to_pack(source: SourceConfig) -> str | None:
    """Returns the format of a source that has to be packed; None if the loader reads it without that, or rejects it."""
    if from_plugins.reads(source.path):
        return format_of(source.path)
    path = place_of(source)
    if path.endswith((".tar", *COMPRESSED)) or not os.path.exists(path):
        return None
    if os.path.isdir(path):
        try:
            names = os.listdir(path)
        except OSError:
            return None
        if {MANIFEST, PROGRESS_FILE} & set(names) or any(name.endswith((".tar", *COMPRESSED)) for name in names):
            return None
    return format_of(path)


@dataclass
class _Packer:
    """Packs sources into folders in `place`.

    Sources that differ only in what packing does not use, such as the split, share one folder, which is listed, packed
    and logged once. `pack`: whether sources may be packed now; `read`: lists a source.
    """

    place: Path
    pack: bool
    read: ReadSource
    _targets: dict[tuple[str, ReadOptions, float | None], Path | None] = field(default_factory=dict)

    def packed(self, source: SourceConfig) -> SourceConfig:
        """Returns the packed source; `source` itself if it consists of shards, or if it is not packed and `pack` is
        false.

        Raises: DataError and StorageError as `packed_sources`.
        """
        form = format_to_pack(source)
        if form is None:
            return source
        path = source.path if "://" in source.path else os.path.abspath(place_of(source))
        options = reading_options(source, form)
        wanted = path, options, source.hold_out
        if wanted not in self._targets:
            self._targets[wanted] = self._target(*wanted)
        target = self._targets[wanted]
        if target is None:
            return source
        # Packed labels of class folders are already class names.
        names = None if form == "classes" else source.class_names
        done = {"path": str(target), "name": source.label, "class_names": names, "table": None, "hold_out": None}
        return source.model_copy(update=done)

    def _target(self, path: str, options: ReadOptions, hold_out: float | None) -> Path | None:
        """Returns the folder of the packed source. If the source is not packed yet, packs it, or returns None if
        `pack` is false."""
        listing = self.read(path, options)
        if hold_out is not None:
            check_splits(path, {row.split for row in listing.rows})
        title = known_formats()[str(options.format)].title
        name = _UNSAFE.sub("_", os.path.basename(path))[:60]
        target = self.place / f"{name}-{_fingerprint(path, listing, hold_out)}"
        if _is_whole(target):
            _log.info("source %s is %s; it was packed before, and is read from %s", path, title, target)
        elif not self.pack:
            return None
        else:
            _log.info("source %s is %s; it is packed once, and then read from %s", path, title, target)
            _pack_into(target, path, listing, hold_out)
        return target


def _pack_into(target: Path, path: str, listing: Listing, hold_out: float | None) -> None:
    """Packs a source into `target`. If another process is packing it, waits for it and uses its result.

    Args: listing: of the source; the name of `target` contains its fingerprint.
    """
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    options = PackOptions(progress=sys.stderr.isatty(), hold_out=hold_out)
    while not _is_whole(target):
        try:
            manifest = pack_folder(path, target, options, listing=listing)
        except InUseError:
            if multiprocessing.parent_process() is not None:
                raise  # in a script without `if __name__ == "__main__"`, a worker would wait for its own parent
            _log.info("source %s: another process is packing it into %s; waiting for it", path, target)
            wait_until_free(target)
            continue
        if manifest["skipped"]:
            count, first = len(manifest["skipped"]), manifest["skipped"][0]
            detail = f"{first['file']}: {first['reason']}"
            _log.warning("source %s: %d files or rows were left out, the first: %s", path, count, detail)
        return


def _is_whole(folder: Path) -> bool:
    """Whether `folder` has a manifest that can be read, and all of its shards with the sizes in the manifest."""
    try:
        shards = read_manifest(folder)["shards"]
        return all(os.path.getsize(folder / shard["file"]) == shard["bytes"] for shard in shards)
    except (DataError, StorageError, OSError):
        return False


def reading_options(source: SourceConfig, form: str) -> ReadOptions:
    """Returns the options with which a source is read for packing. Args: form: result of `format_to_pack`."""
    table = source.table
    options = {"format": form, "captions": source.captions if "captions" in known_formats()[form].uses else "one"}
    if form == "classes" and source.class_names is not None:
        options["class_names"] = Path(source.class_names)
    if table is not None:
        options |= {"image_key": table.image_key, "caption_keys": tuple(table.caption_keys)}
        options |= {"label_key": table.label_key, "split_key": table.split_key}
        options["images"] = None if table.images is None else Path(table.images)
    return ReadOptions(**options)


def _fingerprint(path: str, listing: Listing, hold_out: float | None) -> str:
    """Returns a hash of the path, the listing, the sizes and modification times of its files, and `hold_out`."""
    state = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8)
    for row in listing.rows:
        try:
            found = os.stat(row.place(listing.root))
            stamp = [found.st_size, found.st_mtime_ns]
        except OSError:
            stamp = []
        state.update(json.dumps([row.file, row.kind, row.captions, row.label, row.split, row.set, stamp]).encode())
    state.update(json.dumps(list(listing.left_out.items())).encode())
    state.update(b"" if hold_out is None else f"hold_out {hold_out!r}".encode())
    return state.hexdigest()
