"""Files to S3: large ones in parts at once, every part checked by the store, all of a file or nothing of it.

The SHA-256 of a file is kept with its object, so that a later run knows that it is there without reading it.

boto3's `upload_file` would lose four things (tried with boto3 1.44.5 on the store of the tests, benchmarks/LOG.md). It
refuses Content-MD5 and compares no ETag; its own checksums, CRC32 or SHA256, bind only a store that knows them: a byte
that was flipped on the way gave a damaged object and no error. It gives up after a number of attempts, not after
`give_up_s` without an answer. It calls an upload failed whose last answer was lost, while the object is whole. Parts
that a killed process has left stay.
"""

from __future__ import annotations

import hashlib
import logging
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.data.storage.s3_client import address, status_of
from univitar_ds.errors import DataError

_log = logging.getLogger(__name__)

PART_BYTES = 16 << 20
_MOST_PARTS = 10_000
_THREADS = 4
_ATTEMPTS = 3
"""How often a part is sent that arrives wrong."""


def put_file(storage: S3Storage, url: str, path: Path, sha256: str) -> None:
    """Write a local file to `url`; returns once the store has all of it.

    Args: sha256, of its content, in hex.
    Raises: DataError if the store refuses, is silent for too long, or does not hold what was sent.
    """
    size = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
    if size <= part_bytes:
        put_bytes(storage, url, path.read_bytes(), sha256)
        return
    answer = storage.connection.call("create_multipart_upload", url, **address(url), Metadata={"sha256": sha256})
    upload = {**address(url), "UploadId": answer["UploadId"]}
    try:
        send = partial(_send_part, storage, url, upload, path, part_bytes)
        with ThreadPoolExecutor(_THREADS, "upload") as threads:
            parts = list(threads.map(send, range(-(-size // part_bytes))))
        _complete(storage, url, upload, parts, size, sha256)
    except BaseException:
        with suppress(DataError):  # what has gone wrong before is what the user should hear of
            storage.connection.call("abort_multipart_upload", url, **upload)
        raise
    _abort_abandoned(storage, url)


def put_bytes(storage: S3Storage, url: str, content: bytes, sha256: str | None = None) -> None:
    """Write an object of a few megabytes. Raises: as `put_file`."""
    digest = sha256 or hashlib.sha256(content).hexdigest()
    _send(storage, "put_object", url, content, {**address(url), "Metadata": {"sha256": digest}})
    if not holds(storage, url, len(content), digest):
        raise _not_there(url, len(content))


def holds(storage: S3Storage, url: str, size: int, sha256: str) -> bool:
    """Whether the store has an object of this size in bytes that was written with this SHA-256."""
    storage.forget(url)
    try:
        found = storage.head(url)
    except DataError as error:
        if status_of(error) != 403:
            raise
        found = None  # absent objects are hidden from who may not list all
    return found is not None and found["ContentLength"] == size and found["Metadata"].get("sha256") == sha256


def remove(storage: S3Storage, url: str) -> None:
    """Remove an object; one that is not there is no error."""
    storage.forget(url)
    storage.connection.call("delete_object", url, **address(url))


def _send_part(
    storage: S3Storage, url: str, upload: dict[str, str], path: Path, part_bytes: int, index: int
) -> dict[str, Any]:
    with path.open("rb") as stream:
        stream.seek(index * part_bytes)
        content = stream.read(part_bytes)
    etag = _send(storage, "upload_part", url, content, {**upload, "PartNumber": index + 1})
    return {"PartNumber": index + 1, "ETag": etag}


def _send(storage: S3Storage, operation: str, url: str, content: bytes, parameters: dict[str, Any]) -> str:
    """Send bytes with their MD5, which every store checks; those that answer with it are checked in turn."""
    digest = hashlib.md5(content, usedforsecurity=False)
    parameters = {**parameters, "Body": content, "ContentMD5": b64encode(digest.digest()).decode()}
    for _ in range(_ATTEMPTS):
        answer = storage.connection.call(operation, url, **parameters)
        encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
        etag: str = answer["ETag"]
        if encrypted or etag.strip('"') == digest.hexdigest():
            return etag
        _log.warning("%s: %d bytes arrived with another checksum, sending them again", url, len(content))
    raise DataError(
        f"{url}: {len(content)} bytes arrived damaged {_ATTEMPTS} times; check the network and the store and run again"
    )


def _complete(
    storage: S3Storage, url: str, upload: dict[str, str], parts: list[dict[str, Any]], size: int, sha256: str
) -> None:
    failure: DataError | None = None
    try:
        storage.connection.call("complete_multipart_upload", url, **upload, MultipartUpload={"Parts": parts})
    except DataError as error:  # a repeat after a lost answer finds no such upload: it is complete already
        failure = error
    if not holds(storage, url, size, sha256):
        raise failure or _not_there(url, size)


def _abort_abandoned(storage: S3Storage, url: str) -> None:
    """Uploads of this object that were begun by a run that was killed: their parts are stored and paid for."""
    where = address(url)
    with suppress(DataError):  # it may be forbidden, and nothing depends on it
        found = storage.connection.call("list_multipart_uploads", url, Bucket=where["Bucket"], Prefix=where["Key"])
        for row in found.get("Uploads", ()):
            if row["Key"] == where["Key"]:
                storage.connection.call("abort_multipart_upload", url, **where, UploadId=row["UploadId"])


def _not_there(url: str, size: int) -> DataError:
    return DataError(f"{url}: the store does not hold the {size} bytes that were written to it; run again")
