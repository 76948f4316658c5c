"""The interface for reading files, and the settings for access to remote files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, Protocol

from univitar_ds.data.storage.session import session_folder
from univitar_ds.errors import DataError

S3 = "s3://"
SCHEMES = "a local path or an s3:// address"


@dataclass(frozen=True)
class StorageSettings:
    """Settings for remote files and their local cache; see `config.data.S3Config` and `CacheConfig`.

    `session` is a folder that the processes of one run share; see `shared`.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    idle_timeout_s: float = 20.0
    give_up_s: float = 300.0
    prefetch_shards: int = 1
    cache_folder: str | None = None
    cache_limit_gb: float = 20.0
    session: str | None = None

    @classmethod
    def of(cls, data: Any) -> StorageSettings:
        """Returns the settings in the `data` section of a run file."""
        s3, cache = data.s3, data.cache
        return cls(
            s3.endpoint_url,
            s3.profile,
            s3.region,
            s3.idle_timeout_s,
            s3.give_up_s,
            s3.prefetch_shards,
            None if cache.folder is None else os.path.abspath(cache.folder),
            cache.limit_gb,
        )

    def shared(self) -> StorageSettings:
        """Returns the same settings for other processes of this run, which then use the local copies of this process.

        Creates a temporary folder that is removed when this process ends.
        """
        return self if self.session else replace(self, session=session_folder())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> StorageSettings:
        return cls(**document)


LOCAL = StorageSettings()
"""Default settings. They suffice for local files, and for S3 if boto3 finds its own configuration."""


class ReplacedError(DataError):
    """An object has another version than the one that was found at first, or is no longer there."""


class Storage(Protocol):
    """Interface for read-only access to files. All methods raise DataError with the path of the file."""

    def open(self, path: str) -> BinaryIO:
        """Returns a readable and seekable stream at byte 0, optimized for sequential reads."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Returns exactly `length` bytes from `offset`."""

    def read(self, path: str) -> bytes:
        """Returns the content of a small file."""

    def size(self, path: str) -> int:
        """Returns the size of a file in bytes."""

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder at this path."""

    def list(self, prefix: str) -> Sequence[str]:
        """Returns the paths of the files directly in the folder `prefix`, sorted by name."""

    def folders(self, prefix: str) -> Sequence[str]:
        """Returns the paths of the folders directly in the folder `prefix`, sorted by name."""

    def prefetch(self, paths: Sequence[str]) -> None:
        """Hints that these files will be opened next, in this order."""
