"""Selects the storage for a path or URL."""

from __future__ import annotations

import os
import re

from univitar_ds.data.storage.base import LOCAL, S3, SCHEMES, Storage, StorageSettings
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import DataError

_ELSEWHERE = (
    (("file",), ": leave file:// out"),
    (("hf",), "; download the data set first (hf download) and give the folder"),
    (("http", "https"), "; download the shards first, or give the s3:// address if they are in an S3 store"),
    (
        ("gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs"),
        "; copy the shards to a disk or to an S3-compatible store",
    ),
)
"""Unsupported schemes and the remedies in their error messages."""
_LOCAL_FILES = LocalStorage()


def storage_for(url: str, settings: StorageSettings = LOCAL, local: LocalStorage = _LOCAL_FILES) -> Storage:
    """Returns the storage for `url`, whose methods accept `url`; for S3 one object per process and `settings`.

    Args: local: the storage for files that are not on S3.
    Raises: DataError for an unsupported scheme.
    """
    if url.startswith(S3):
        from univitar_ds.data.storage.s3 import shared_storage  # imported here, because boto3 takes a second

        return shared_storage(settings)
    if "://" in url:
        check_address(url)
    return local


def real_place(url: str) -> str:
    """Returns a name that is the same for all paths of a file: without links and dots. An s3:// address is returned as
    it is."""
    return url if url.startswith(S3) else os.path.realpath(url)


def is_path_below(name: str) -> bool:
    """Whether the name of an object, below a prefix, is the path of a file below a folder."""
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def check_address(url: str) -> None:
    """Raises DataError if `url` is neither a local path nor an s3:// address."""
    if os.path.exists(url):  # the name of a local file may contain a colon
        return
    if url.startswith("pipe:"):
        address = re.search(r"s3://\S+", url)
        remedy = f"give {address[0]}" if address else "copy the shards to a disk or an S3 store, and give its path"
        raise DataError(f"{url}: WebDataset's pipe: cannot be used, because shards are read by random access; {remedy}")
    if "::" in url:
        raise DataError(
            f"{url}: WebDataset's :: between shards cannot be used; give each shard as a separate source, or name "
            "them by braces, {a,b}.tar or {000..127}.tar"
        )
    scheme, separator, _ = url.partition("://")
    if separator and not url.startswith(S3):
        hint = next((hint for schemes, hint in _ELSEWHERE if scheme in schemes), "")
        raise DataError(f"{url}: cannot read from {scheme}://; a source must be {SCHEMES}{hint}")
