"""Finds the items of sources (files, folders of files, and shards), and divides them into units of work.

The units depend only on the sources, not on the number of processes. A unit belongs to one part of the result. All
parts except the last have the same number of items, so that a later call can begin with any part.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from univitar_ds.config.data import SourceConfig
from univitar_ds.config.paths import written
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from univitar_ds.data.sampler.reader import HINTED, announce
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.manifest import MANIFEST, PROGRESS_FILE
from univitar_ds.data.shards.sources import SourceShard, find_shards, fingerprint
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import LOCAL, S3, StorageSettings
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.errors import ConfigError

MEDIA = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
_BRACES = re.compile(r"\{[^{}]*\}")
Place = tuple[str, ...] | SourceShard
"""The files of a source in order, or one shard."""


class Position(NamedTuple):
    """A position in a list of places. `offset`: index of a file, or byte of a shard at which a sample begins."""

    place: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Unit:
    """Consecutive items: `files`, or the samples of a shard whose headers begin in its bytes [start, end).

    `number` is the index of the unit, `part` the part of the result, `after` the position after the unit.
    """

    number: int
    part: int
    after: Position
    files: tuple[str, ...] = ()
    shard: Shard | None = None
    start: int = 0
    end: int = 0


def find_places(
    sources: Sequence[str], settings: StorageSettings = LOCAL, *, split: str | None = None, shards: bool = True
) -> list[Place]:
    """Returns the places of the sources, in order.

    A source is a file; a folder, with the images and videos in it and its subfolders, in the order of their names; or
    shards: a tar, a brace range of tars, or a folder with tars. All may be on S3. Hidden files are left out. A file
    that several sources name is listed once.

    Args: split: split of packed folders, None for all; shards: whether sources may be shards. If not, any local path
        that is not a folder is a file, and tars in folders are left out.
    Raises: ConfigError if a source does not exist or has no items; DataError as `find_shards`.
    """
    found: list[list[str] | str] = []
    seen: set[str] = set()
    for source in sources:
        if shards and _holds_shards(source, settings):
            found.append(source)
            continue
        remote = source.startswith(S3) and _extension(source) not in MEDIA
        if remote or os.path.isdir(source):
            files = _files_on_s3(source, settings) if remote else list(_files_of(source))
            if not files:
                raise ConfigError(f"{source} holds no image, video or tar; name another folder, or the files")
        elif not source.startswith(S3) and not os.path.lexists(source):
            raise ConfigError(f"{source}: there is no such file or folder; check the path")
        else:
            files = [source]
        files = list(_not_seen(files, seen))
        if not files:
            continue
        if found and isinstance(found[-1], list):
            found[-1] += files
        else:
            found.append(files)
    named = [SourceConfig(path=written(source), split=split) for source in found if isinstance(source, str)]
    listed = iter(_by_source(named, settings)) if named else iter(())
    places: list[Place] = []
    for source in found:
        places += [tuple(source)] if isinstance(source, list) else next(listed)
    return places


def units(places: Sequence[Place], part_items: int, unit_items: int, start: Position, part: int) -> Iterator[Unit]:
    """Yields the units from `start` on. Shards are scanned while the units are consumed.

    Args: part_items: items of a part; unit_items: maximum number of items of a unit; part: number of the part that
        begins at `start`.
    Raises: DataError if a shard cannot be read.
    """
    left = part_items
    number = 0
    for index in range(start.place, len(places)):
        place = places[index]
        offset = start.offset if index == start.place else 0
        length = length_of(place)
        while True:
            room = min(left, unit_items)
            if isinstance(place, tuple):
                files = place[offset : offset + room]
                count, end = len(files), offset + len(files)
                about = {"files": files}
            else:
                if not offset:
                    _announce(places[index + 1 :])
                count, end = _samples(place, offset, room)
                about = {"shard": replace(place, storage=None, watch=None), "start": offset, "end": end}
            after = Position(index, end) if end < length else Position(index + 1)
            yield Unit(number, part, after, **about)
            offset, number, left = end, number + 1, left - count
            if not left:
                part, left = part + 1, part_items
            if after.place != index:
                break


def count_items(places: Sequence[Place]) -> int | None:
    """Returns the number of items; None if a shard has no manifest."""
    counts = [len(place) if isinstance(place, tuple) else place.samples for place in places]
    return None if None in counts else sum(counts)


def fingerprint_of(places: Sequence[Place], settings: StorageSettings = LOCAL) -> str:
    """Returns a hash of the items: names, sizes and times of files, or ETags on S3; the fingerprint of shards as in a
    run.

    Raises: DataError if a shard cannot be read, or a store does not answer.
    """
    state = hashlib.blake2b(digest_size=16)
    for place in places:
        if not isinstance(place, tuple):
            continue
        storages = [storage_for(path, settings) for path in place if path.startswith(S3)]
        for path, about in zip(place, at_once(partial(_state_of, settings), place, storages), strict=True):
            state.update(f"{path}\0{about}\n".encode("utf-8", "surrogateescape"))
    shards = [place for place in places if not isinstance(place, tuple)]
    if shards:
        state.update(fingerprint(shards).encode())
    return state.hexdigest()


def _state_of(settings: StorageSettings, path: str) -> str:
    """Returns a text that changes with a file; "" for a file that will be left out."""
    if path.startswith(S3):
        storage = storage_for(path, settings)
        assert isinstance(storage, S3Storage)
        return storage.identity(path) or ""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _holds_shards(source: str, settings: StorageSettings) -> bool:
    """Returns whether a source is read as shards. Raises: ConfigError for a folder with tars and images."""
    if _extension(source) == "tar" or source.endswith(f"/{MANIFEST}") or _BRACES.search(source):
        return not os.path.isfile(source) or _extension(source) not in MEDIA
    if source.startswith(S3):
        if _extension(source) in MEDIA:
            return False
        names = [path.rpartition("/")[2] for path in storage_for(source, settings).list(source)]
    elif os.path.isdir(source):
        names = os.listdir(source)
    else:
        return False
    if {MANIFEST, PROGRESS_FILE} & set(names):
        return True
    tars = [name for name in names if name.endswith(".tar")]
    media = [name for name in names if _extension(name) in MEDIA]
    if tars and media:
        raise ConfigError(
            f"{source} holds shards ({tars[0]}) beside images or videos ({media[0]}); name the shards or the files"
        )
    return bool(tars)


def _by_source(sources: Sequence[SourceConfig], settings: StorageSettings) -> list[list[Place]]:
    """Returns the shards of each source. Their names are unique among all sources."""
    found = find_shards(sources, settings)
    if len(sources) == 1:
        return [list(found)]
    lists: list[list[Place]] = [[] for _ in sources]
    for shard in found:
        lists[int(shard.name.partition(":")[0])].append(shard)
    return lists


def _files_of(folder: str) -> Iterator[str]:
    """Yields the images and videos in a folder and its subfolders, without hidden ones. Follows links, but visits each
    folder once.

    Raises: ConfigError for a folder that cannot be read, since otherwise its files would be missing silently.
    """

    def unreadable(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}); ask for permission, or name others")

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        state = os.stat(parent)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and _extension(name) in MEDIA:
                yield os.path.join(parent, name)


def _files_on_s3(folder: str, settings: StorageSettings) -> list[str]:
    """Returns the addresses of images and videos below a folder of S3, without hidden ones, in the order that the same
    files have on a disk. Raises: DataError if they cannot be listed."""
    storage = storage_for(folder, settings)
    assert isinstance(storage, S3Storage)
    folder = folder.rstrip("/")
    names = [path.removeprefix(f"{folder}/").split("/") for path in storage.pinned_below(folder)]
    kept = [
        parts for parts in names if _extension(parts[-1]) in MEDIA and not any(one.startswith(".") for one in parts)
    ]
    kept.sort(key=lambda parts: [*((True, one) for one in parts[:-1]), (False, parts[-1])])
    return ["/".join([folder, *parts]) for parts in kept]


def _not_seen(files: Sequence[str], seen: set[str]) -> Iterator[str]:
    """Yields the files that are not in `seen`, and adds them to it."""
    for file in files:
        path = file if file.startswith(S3) else os.path.abspath(file)
        if path not in seen:
            seen.add(path)
            yield file


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower().lstrip(".")


def length_of(place: Place) -> int:
    return len(place) if isinstance(place, tuple) else place.size


def _announce(places: Sequence[Place]) -> None:
    announce([place for place in places[:HINTED] if not isinstance(place, tuple)])


def _samples(shard: SourceShard, start: int, most: int) -> tuple[int, int]:
    """Returns the number of samples, at most `most`, from byte `start` on, and the byte after them."""
    count = 0
    with shard.storage.open(shard.path) as stream:
        for found in tar_index.scan(stream, shard.name, shard.size, start):
            if isinstance(found, tar_index.Group):
                if count == most:
                    return count, found.offset
                count += 1
    return count, shard.size
