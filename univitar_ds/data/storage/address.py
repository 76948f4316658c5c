"""Which storage serves an address. Only this module knows what kind of place a path points to."""

from __future__ import annotations

import os
import re

from univitar_ds.data.storage.base import LOCAL, S3, SCHEMES, Storage, StorageSettings
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.errors import DataError

_ELSEWHERE = (
    (("file",), ": leave file:// out"),
    (("hf",), "; download the data set first (hf download) and give the folder"),
    (("http", "https"), "; download the shards first, or give the s3:// address of what lies in an S3 store"),
    (("gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs"), "; copy the shards to a disk or to a store that speaks S3"),
)
"""Schemes of other places, and what to do."""



def storage_for(url: str, settings: StorageSettings = LOCAL) -> Storage:
    """The storage that serves `url`; its methods take the same url. One object per process and settings.

    Raises: DataError for a scheme that nothing here reads.
    """
    if url.startswith(S3):
        from univitar_ds.data.storage.s3 import shared_storage  # boto3 takes a second

        return shared_storage(settings)
    if "://" in url:
        check_address(url)
    return LocalStorage()


def check_address(url: str) -> None:
    """Raises: DataError for what is neither a local path nor on S3; it names what it is and what to do instead."""
    if os.path.exists(url):  # a colon is as good as any letter
        return
    if url.startswith("pipe:"):
        address = re.search(r"s3://\S+", url)
        remedy = f"give {address[0]}" if address else "copy the shards to a disk or an S3 store, and give that"
        raise DataError(f"{url}: pipe: is a command to webdataset, but shards are read at any byte here; {remedy}")
    if "::" in url:
        raise DataError(
            f"{url}: :: joins several shards for webdataset; here each is a source of its own, or one source names "
            "them by braces, {a,b}.tar or {000..127}.tar"
        )
    scheme, separator, _ = url.partition("://")
    if separator and not url.startswith(S3):
        hint = next((hint for schemes, hint in _ELSEWHERE if scheme in schemes), "")
        raise DataError(f"{url}: cannot read from {scheme}://; a source must be {SCHEMES}{hint}")
