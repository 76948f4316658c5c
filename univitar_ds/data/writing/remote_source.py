"""Copies a source on S3 into the workspace of packing, where it is read like a local one.

Shards hold samples in the order of a hash, so that media are needed in any order, and twice. Every object is fetched
once, by the client of S3 with its retries. An interrupted packing continues the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from univitar_ds.data.importing.recognise import files_named, read_source
from univitar_ds.data.importing.rows import MEDIA, Listing, ReadOptions
from univitar_ds.data.importing.table_files import EXTENSIONS
from univitar_ds.data.shards.listing import COMPRESSED, expand_braces
from univitar_ds.data.shards.manifest import MANIFEST, PROGRESS_FILE
from univitar_ds.data.storage.address import is_path_below, storage_for
from univitar_ds.data.storage.base import S3, ReplacedError, StorageSettings
from univitar_ds.data.storage.cache_dir import Version
from univitar_ds.data.storage.parallel import AT_ONCE, at_once
from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.data.writing.progress_log import ProgressLog
from univitar_ds.errors import DataError, StorageError
from univitar_ds.screen import progress_bar

COPIES = ".pack.source"
"""Name of the folder of copies in a workspace."""
_READ = MEDIA | {"txt", "tar"} | {extension.removeprefix(".") for extension in EXTENSIONS}
"""Extensions of objects that are copied. Others are not read in a folder either."""
_NAME_BYTES = 255
_BATCH = 64 * AT_ONCE
"""Number of objects that are in the queue at once."""


class RemoteFile(NamedTuple):
    """An object: its name below the source, its version, and its time of modification in Unix seconds."""

    name: str
    version: Version
    modified: float


@dataclass(frozen=True)
class RemoteSource:
    """A source on S3. `base`: address of the folder in which the names of `files` start; `place`: the source in it, ""
    for the folder itself; `left_out`: objects whose names cannot be those of files, with the reason."""

    url: str
    base: str
    place: str
    files: Sequence[RemoteFile]
    storage: S3Storage
    left_out: dict[str, str] = field(default_factory=dict)

    def digest(self, options: Any) -> str:
        """Returns a hash of the objects and of `options`, a dataclass."""
        about = [[file.name, file.version.etag, file.version.size] for file in self.files]
        return hashlib.sha256(json.dumps([self.url, about, asdict(options)], default=str).encode()).hexdigest()

    def is_fixed(self, options: ReadOptions) -> bool:
        """Whether `digest` covers everything that is packed: no files that a table names, and no other files."""
        return not self.place.endswith(tuple(EXTENSIONS)) and options.class_names is None


def find_source(url: str, settings: StorageSettings) -> RemoteSource:
    """Lists the objects of a source: a folder, a table, a tar or a brace range of tars.

    Raises: DataError if there is none, or the source is a packed folder.
    """
    if not url.removeprefix(S3).strip("/"):
        raise DataError(f"{url} names no bucket; write s3://BUCKET/PREFIX")
    storage = storage_for(url, settings)
    assert isinstance(storage, S3Storage)
    url = url.rstrip("/")
    if url.endswith(COMPRESSED):
        raise DataError(f"{url}: is a compressed tar; decompress it first")
    if url.endswith((".tar", *EXTENSIONS)):
        return _of_objects(url, storage)
    found = storage.versions_below(url)
    names = {version.url.removeprefix(f"{url}/") for version, _ in found}
    if names & {MANIFEST, PROGRESS_FILE}:
        raise DataError(f"{url} is packed already; a run reads it as it is, so give it as a source")
    left_out: dict[str, str] = {}
    folders = {str(parent) for name in names for parent in Path(name).parents}
    files = []
    for version, modified in found:
        name = version.url.removeprefix(f"{url}/")
        extension = posixpath.splitext(name)[1].lower().lstrip(".")
        if extension not in _READ or any(part.startswith(".") and part.strip(".") for part in name.split("/")):
            continue
        reason = "duplicate: there is a folder of this name" if name in folders else _fault(name)
        if reason:
            left_out[name] = reason
        else:
            files.append(RemoteFile(name, version, modified))
    if not files:
        more = f" ({len(left_out)} left out: {next(iter(left_out.items()))})" if left_out else ""
        raise DataError(f"{url} holds no image, video, table or tar{more}; check the address")
    return RemoteSource(url, url, "", files, storage, left_out)


def _of_objects(url: str, storage: S3Storage) -> RemoteSource:
    base = url.rpartition("/")[0]
    while "{" in base:
        base = base.rpartition("/")[0]
    urls = expand_braces(url) if url.endswith(".tar") else [url]
    files = [_found(one, base, storage) for one in urls]
    return RemoteSource(url, base, url.removeprefix(f"{base}/"), files, storage)


def _found(url: str, base: str, storage: S3Storage) -> RemoteFile:
    found = storage.version_of(url)
    name = url.removeprefix(f"{base}/")
    reason = "there is no such object" if found is None else _fault(name)
    if found is None or reason:
        raise DataError(f"{url}: {reason}; check the address")
    return RemoteFile(name, *found)


def _fault(name: str) -> str | None:
    """Returns why the name of an object cannot be the path of a file below a folder; None if it can."""
    if not is_path_below(name):
        return "unreadable: its name is no path of a file; rename the object"
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in name.split("/")):
        return f"unreadable: a part of its name has more than {_NAME_BYTES} bytes; rename the object"
    return None


def read_copied(
    source: RemoteSource, workspace: Path, progress_log: ProgressLog, options: ReadOptions, progress: bool
) -> tuple[RemoteSource, Listing]:
    """Copies a source into `workspace`. Returns it with the files that its table names, and the listing of the copy.

    Raises: DataError if an object cannot be read, or as `read_source`; StorageError if the disk is too small.
    """
    folder = workspace.absolute() / COPIES
    place = str(folder / source.place)
    try:
        if source.place.endswith(tuple(EXTENSIONS)) and options.images is None:
            _copy(source, folder, progress_log, progress)
            named = _named(source, files_named(place, options))
            source = replace(source, files=[*source.files, *named])
        for stale in progress_log.copied() - {file.name for file in source.files}:
            with suppress(FileNotFoundError):
                (folder / stale).unlink()
        _copy(source, folder, progress_log, progress)
        listing = read_source(place, options, source.url)
    except DataError as error:
        raise DataError(str(error).replace(str(folder), source.base)) from error
    return source, replace(listing, left_out=source.left_out | listing.left_out)


def _named(source: RemoteSource, paths: set[str]) -> list[RemoteFile]:
    """Returns the objects that a table names, those that exist below its folder. Others get the fault of a local
    file that is missing."""
    names = {name for path in paths if _fault(name := posixpath.normpath(path)) is None}
    names -= {file.name for file in source.files}
    if not names:
        return []
    common = os.path.commonpath([posixpath.dirname(name) for name in names])
    found = source.storage.versions_below(posixpath.join(source.base, common))
    files = [RemoteFile(version.url.removeprefix(f"{source.base}/"), version, modified) for version, modified in found]
    return [file for file in files if file.name in names]


def _copy(source: RemoteSource, folder: Path, progress_log: ProgressLog, progress: bool) -> None:
    """Copies the objects that are not in `folder` yet."""
    missing = [file for file in source.files if not _is_copied(file, folder, progress_log)]
    needed = sum(file.version.size for file in missing)
    for parent in {(folder / file.name).parent for file in source.files}:
        parent.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise StorageError(
            f"{source.url}: {needed / 1e9:.1f} GB are copied into {folder} for packing, where {free / 1e9:.1f} GB are "
            "free; pack into a folder of a larger disk, or pack a part of the source"
        )

    def fetch(file: RemoteFile) -> RemoteFile:
        path = folder / file.name
        try:
            source.storage.copy(file.version, path)
        except ReplacedError as error:
            raise DataError(
                f"{file.version.url}: the object was replaced or removed since the source was listed; run the same "
                "command again when nothing writes to the source (finished copies are kept), or pack a copy of it"
            ) from error
        # The same object has the same time in every copy, so that its file is not examined again.
        odd = int.from_bytes(hashlib.sha256(file.version.etag.encode()).digest()[:4], "big") % 10**9
        os.utime(path, ns=(time := int(file.modified) * 10**9 + odd, time))
        return file

    with progress_bar(total=len(missing), desc="copy", unit="file", disable=not (progress and missing)) as bar:
        for start in range(0, len(missing), _BATCH):
            for file in at_once(fetch, missing[start : start + _BATCH], [source.storage]):
                progress_log.add_copied(file.name, file.version.etag)
                bar.update()


def _is_copied(file: RemoteFile, folder: Path, progress_log: ProgressLog) -> bool:
    path = folder / file.name
    try:
        return progress_log.copied_version(file.name) == file.version.etag and path.stat().st_size == file.version.size
    except OSError:
        return False


def remove_copies(source: RemoteSource, workspace: Path) -> None:
    """Removes the copies of a source, and their folders if they are empty then."""
    folder = workspace / COPIES
    for file in source.files:
        with suppress(OSError):
            (folder / file.name).unlink()
    for parent in sorted({parent for file in source.files for parent in Path(file.name).parents}, reverse=True):
        with suppress(OSError):
            (folder / parent).rmdir()
