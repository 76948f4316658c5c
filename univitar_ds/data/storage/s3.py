"""Reads objects on S3, one version of each object, from local copies or with range requests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from univitar_ds.data.storage.base import S3, ReplacedError, StorageSettings
from univitar_ds.data.storage.cache_dir import Version
from univitar_ds.data.storage.s3_client import Connection, address, changed, refused, status_of
from univitar_ds.data.storage.session import Pins, session_folder
from univitar_ds.data.storage.shard_cache import ShardCache
from univitar_ds.errors import DataError


class S3Storage:
    """The `Storage` for S3. Shards are read from local copies (`ShardCache`), small files and other ranges directly."""

    def __init__(self, settings: StorageSettings) -> None:
        session = settings.session or session_folder()
        self.connection = Connection(settings)
        self._settings = settings
        self._pins = _pins_of(session, settings.endpoint_url, os.getpid())
        folder = Path(settings.cache_folder or Path(session, "shards"))
        with suppress(OSError):  # the error is raised when the first copy is created
            folder.parent.mkdir(parents=True, exist_ok=True)
        patience_s = settings.give_up_s + settings.idle_timeout_s
        self._shard_cache = ShardCache(folder, int(settings.cache_limit_gb * 1e9), self.connection.stream, patience_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return shared_storage, (self._settings.shared(),)

    def open(self, path: str) -> BinaryIO:
        return self._shard_cache.open(self._version(path))

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0, (offset, length)
        version = self._version(path)
        if offset + length > version.size:
            raise DataError(
                f"{path}: ends at byte {version.size}, but {length} bytes were expected from byte {offset} on; "
                "the object was truncated or replaced while it was in use: restore it or pack it again"
            )
        found = self._shard_cache.read(version, offset, length)
        return self._directly(version, offset, length) if found is None else found

    def read(self, path: str) -> bytes:
        version = self._version(path)
        return self._directly(version, 0, version.size)

    def size(self, path: str) -> int:
        return self._found(path)[1]

    def exists(self, path: str) -> bool:
        """Whether there is an object or folder. Lists first, as credentials often forbid HEAD on a folder's name."""
        where = address(path.rstrip("/") + "/")
        below = {"Bucket": where["Bucket"], "Prefix": where["Key"], "MaxKeys": 1}
        may_list = True
        try:
            if self.connection.call("list_objects_v2", path, **below).get("KeyCount", 0):
                return True
        except DataError as error:
            if status_of(error) != 403 or not where["Key"]:
                raise
            may_list = False
        if not where["Key"]:
            return True
        try:
            return self.head(path) is not None
        except DataError as error:
            if may_list and status_of(error) == 403:  # S3 answers 403 for absent objects without ListBucket
                return False
            raise

    def list(self, prefix: str) -> Sequence[str]:
        """Lists a folder with one request per thousand names, and pins the version of each object."""
        where = address(prefix.rstrip("/") + "/")
        paths: list[str] = []
        for page in self._pages(prefix, Delimiter="/"):
            for row in page.get("Contents", ()):
                path = f"{S3}{where['Bucket']}/{row['Key']}"
                if row["Key"] != where["Key"]:
                    self._pin(path, row.get("ETag", ""), row["Size"])
                    paths.append(path)
        return sorted(paths)

    def folders(self, prefix: str) -> Sequence[str]:
        bucket = address(prefix)["Bucket"]
        rows = [row for page in self._pages(prefix, Delimiter="/") for row in page.get("CommonPrefixes", ())]
        return sorted(f"{S3}{bucket}/{row['Prefix']}".rstrip("/") for row in rows)

    def _pages(self, prefix: str, **parameters: str) -> Iterator[dict[str, Any]]:
        """Yields the answers to requests for the objects below the folder `prefix`."""
        where = address(prefix.rstrip("/") + "/")
        more: dict[str, str] = {}
        while True:
            below = {"Bucket": where["Bucket"], "Prefix": where["Key"], **parameters, **more}
            page = self.connection.call("list_objects_v2", prefix, **below)
            yield page
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def below(self, prefix: str) -> Sequence[str]:
        """Returns the addresses of all objects below the folder `prefix`, at any depth, without pinning versions."""
        return [version.url for version, _ in self.versions_below(prefix)]

    def pinned_below(self, prefix: str) -> Sequence[str]:
        """Returns the addresses of all objects below the folder `prefix`, at any depth, and pins their versions."""
        found = [version for version, _ in self.versions_below(prefix)]
        for version in found:
            self._pin(version.url, version.etag, version.size)
        return [version.url for version in found]

    def identity(self, path: str) -> str | None:
        """Returns ETag and size of an object as a text, of the pinned version if there is one; None if it does not
        exist. Raises: DataError if the store does not say."""
        if self._pins.get(path) is None:
            answer = self.head(path)
            if answer is None:
                return None
            self._pin(path, answer.get("ETag", ""), answer["ContentLength"])
        return " ".join(map(str, self._found(path)))

    def versions_below(self, prefix: str) -> list[tuple[Version, float]]:
        """Returns version and time of modification (Unix seconds) of all objects below the folder `prefix`, by name."""
        bucket = address(prefix)["Bucket"]
        rows = [row for page in self._pages(prefix) for row in page.get("Contents", ())]
        found = [self._described(f"{S3}{bucket}/{row['Key']}", row, "Size") for row in rows]
        return sorted(found, key=lambda one: one[0].url)

    def copy(self, version: Version, path: Path) -> None:
        """Writes an object to a local file, which is on the disk when this returns.

        Raises: ReplacedError if the object was replaced or removed; DataError if it cannot be read; OSError if the file
            cannot be written.
        """
        with path.open("wb") as stream:
            try:
                for piece in self.connection.stream(version, 0, version.size):
                    stream.write(piece)
            except DataError as error:
                if status_of(error) == 404:
                    raise ReplacedError(str(error)) from error
                raise
            stream.flush()
            os.fsync(stream.fileno())

    def version_of(self, path: str) -> tuple[Version, float] | None:
        """Returns present version and time of modification (Unix seconds) of an object; None if there is none."""
        answer = self.head(path)
        return None if answer is None else self._described(path, answer, "ContentLength")

    def _described(self, path: str, row: dict[str, Any], size: str) -> tuple[Version, float]:
        version = Version(path, row.get("ETag", "").strip('"'), row[size], self._settings.endpoint_url or "")
        return version, row["LastModified"].timestamp()

    def present(self, path: str) -> Version | None:
        """Returns the present version of an object, regardless of pins; None if there is no such object.

        Raises: DataError, also if the store forbids the request.
        """
        answer = self.head(path)
        if answer is None:
            return None
        return Version(path, answer.get("ETag", "").strip('"'), answer["ContentLength"])

    def prefetch(self, paths: Sequence[str]) -> None:
        coming = paths[: self._settings.prefetch_shards]
        self._shard_cache.prefetch([self._version(path) for path in coming if self._pins.get(path) is not None])

    def head(self, path: str) -> dict[str, Any] | None:
        """Returns the answer to a HEAD request; None if there is no such object."""
        try:
            return self.connection.call("head_object", path, **address(path))
        except DataError as error:
            if status_of(error) == 404:
                return None
            raise

    def forget(self, path: str) -> None:
        """Unpins the version of an object that this program wrote or removed."""
        self._pins.forget(path)

    def _version(self, path: str) -> Version:
        """Returns the version that all processes of this run read."""
        found = self._found(path)
        self._pins.share(path)
        return Version(path, *found, self._settings.endpoint_url or "")

    def _found(self, path: str) -> tuple[str, int]:
        """Returns ETag and size in bytes."""
        found = self._pins.get(path)
        if found is None:
            answer = self.head(path)
            if answer is None:
                raise refused(path, 404, "")
            found = self._pin(path, answer.get("ETag", ""), answer["ContentLength"])
        return found

    def _pin(self, path: str, etag: str, size: int) -> tuple[str, int]:
        """Pins the version. Raises: DataError if another version is pinned already."""
        version = (etag.strip('"'), size)
        if not version[0]:
            raise DataError(
                f"{path}: the store returns no ETag, so replaced objects cannot be detected; use another store"
            )
        known = self._pins.get(path)
        if known is not None and known != version:
            raise changed(path)
        self._pins.set(path, *version)
        return version

    def _directly(self, version: Version, offset: int, length: int) -> bytes:
        return b"".join(bytes(piece) for piece in self.connection.stream(version, offset, offset + length))


def shared_storage(settings: StorageSettings) -> S3Storage:
    """Returns the storage of this process and `settings`. A forked process must not use its parent's connections."""
    return _storage_of(settings, os.getpid())


@cache
def _pins_of(session: str, endpoint_url: str | None, process: int) -> Pins:
    """Returns the pins that all storages of a process and store have in common."""
    return Pins(session)


@cache
def _storage_of(settings: StorageSettings, process: int) -> S3Storage:
    return S3Storage(settings)
