"""Uploads files to S3 atomically, large files in concurrent parts, with a checksum of every part.

The SHA-256 of a file is stored in the metadata of its object, so that a later run can skip the upload.

boto3's `upload_file` has four disadvantages (tried with boto3 1.44.5 on moto, the tests' store; benchmarks/LOG.md):
- It rejects Content-MD5 and does not compare ETags. Stores that do not support its checksums (CRC32, SHA256) ignore
  them: a byte flipped in transit gave a damaged object and no error.
- It gives up after a number of attempts, not after `give_up_s` seconds of failures.
- It reports a failure if the last answer is lost, although the object is complete.
- It does not remove the parts of earlier uploads whose process was killed.
"""

from __future__ import annotations

import hashlib
import logging
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.data.storage.s3_client import address, status_of
from univitar_ds.errors import DataError

_log = logging.getLogger(__name__)

PART_BYTES = 16 << 20
"""Bytes of every part but the last; more if a file would otherwise have more than `_MAX_PARTS` parts."""
_MAX_PARTS = 10_000
_THREADS = 4
_ATTEMPTS = 3
"""Maximum number of times that a part, or an object in one part, is sent if it arrives damaged."""


class Conflict(DataError):
    """Raised if another program has written or removed the object in the meantime."""


def put_file(storage: S3Storage, url: str, path: Path, sha256: str) -> None:
    """Uploads a local file to `url`. Returns when the object is complete.

    Args: sha256: SHA-256 of the file, in hex.
    Raises: DataError if the store refuses the upload or does not answer in time, if the bytes arrive damaged again and
        again, or if the store does not have the object afterwards.
    """

    def read(begin: int, end: int) -> bytes:
        with path.open("rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin)

    _put(storage, url, path.stat().st_size, read, sha256)


def put_content(
    storage: S3Storage, url: str, content: memoryview, sha256: str, check_wanted: Callable[[], None] = lambda: None
) -> None:
    """Uploads bytes in memory. Returns when the object is complete.

    Args: check_wanted: called before each part; may raise an error, which cancels the upload.
    Raises: as `put_file`, and the error of `check_wanted`.
    """

    def read(begin: int, end: int) -> bytes:
        check_wanted()
        return bytes(content[begin:end])

    _put(storage, url, len(content), read, sha256)


def _put(storage: S3Storage, url: str, size: int, read: Callable[[int, int], bytes], sha256: str) -> None:
    part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
    if size <= part_bytes:
        put_bytes(storage, url, read(0, size), sha256)
        return
    answer = storage.connection.call("create_multipart_upload", url, **address(url), Metadata={"sha256": sha256})
    upload = {**address(url), "UploadId": answer["UploadId"]}

    def send(index: int) -> dict[str, Any]:
        content = read(index * part_bytes, min((index + 1) * part_bytes, size))
        etag = _send(storage, "upload_part", url, content, {**upload, "PartNumber": index + 1})
        return {"PartNumber": index + 1, "ETag": etag}

    try:
        with ThreadPoolExecutor(_THREADS, "upload") as threads:
            parts = list(threads.map(send, range(-(-size // part_bytes))))
        _complete(storage, url, upload, parts, size, sha256)
    except BaseException:
        with suppress(DataError):  # an error of the abort must not hide the first error
            storage.connection.call("abort_multipart_upload", url, **upload)
        raise
    _abort_abandoned(storage, url)


def put_if(storage: S3Storage, url: str, content: bytes, etag: str | None) -> None:
    """Uploads a small object, but only if no other program has changed it.

    Args: etag: of the version that is replaced; None: there must be no object.
    Raises: as `put_file`; Conflict if another program has written or removed the object in the meantime.
    """
    digest = hashlib.sha256(content).hexdigest()
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
    try:
        _send(storage, "put_object", url, content, {**address(url), "Metadata": {"sha256": digest}, **condition})
    except DataError as error:
        # 404: the version was removed; 409: another write at the same time; 412: there is another version, which this
        # function may have written: if the answer to its first request is lost, the repeated request fails.
        if status_of(error) not in (404, 409, 412):
            raise
        if not holds(storage, url, len(content), digest):
            raise Conflict(
                f"{url} was changed by another program at the same time; let only one run write there, and resume it"
            ) from error
    if not holds(storage, url, len(content), digest):
        raise _not_there(url, len(content))


def put_bytes(storage: S3Storage, url: str, content: bytes, sha256: str | None = None) -> None:
    """Uploads a small object in one request. Raises: as `put_file`."""
    digest = sha256 or hashlib.sha256(content).hexdigest()
    _send(storage, "put_object", url, content, {**address(url), "Metadata": {"sha256": digest}})
    if not holds(storage, url, len(content), digest):
        raise _not_there(url, len(content))


def holds(storage: S3Storage, url: str, size: int, sha256: str) -> bool:
    """Whether the store has an object of this size in bytes with this SHA-256 in its metadata."""
    storage.forget(url)
    try:
        found = storage.head(url)
    except DataError as error:
        if status_of(error) != 403:
            raise
        found = None  # without the permission s3:ListBucket, S3 answers 403 for absent objects
    return found is not None and found["ContentLength"] == size and found["Metadata"].get("sha256") == sha256


def remove(storage: S3Storage, url: str) -> None:
    """Removes an object. An absent object is not an error."""
    storage.forget(url)
    storage.connection.call("delete_object", url, **address(url))


def _send(storage: S3Storage, operation: str, url: str, content: bytes, parameters: dict[str, Any]) -> str:
    """Sends bytes with their MD5, which every store checks, and returns the ETag.

    Also compares the MD5 with the ETag, except if the object is encrypted with a key of KMS or of the client: then the
    ETag is no MD5.
    """
    digest = hashlib.md5(content, usedforsecurity=False)
    parameters = {**parameters, "Body": content, "ContentMD5": b64encode(digest.digest()).decode()}
    for _ in range(_ATTEMPTS):
        answer = storage.connection.call(operation, url, **parameters)
        other_etag = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
        etag: str = answer["ETag"]
        if other_etag or etag.strip('"') == digest.hexdigest():
            return etag
        _log.warning("%s: %d bytes arrived with a wrong checksum; they are sent again", url, len(content))
    raise DataError(
        f"{url}: {len(content)} bytes arrived damaged {_ATTEMPTS} times; check the network and the store and run again"
    )


def _complete(
    storage: S3Storage, url: str, upload: dict[str, str], parts: list[dict[str, Any]], size: int, sha256: str
) -> None:
    failure: DataError | None = None
    try:
        storage.connection.call("complete_multipart_upload", url, **upload, MultipartUpload={"Parts": parts})
    except DataError as error:  # a retry after a lost answer fails, because the upload is complete
        failure = error
    if not holds(storage, url, size, sha256):
        raise failure or _not_there(url, size)


def _abort_abandoned(storage: S3Storage, url: str) -> None:
    """Aborts all unfinished uploads of this object: killed processes left them, and their parts cost storage."""
    where = address(url)
    with suppress(DataError):  # this is optional, and listing uploads may be forbidden
        found = storage.connection.call("list_multipart_uploads", url, Bucket=where["Bucket"], Prefix=where["Key"])
        for row in found.get("Uploads", ()):
            if row["Key"] == where["Key"]:
                storage.connection.call("abort_multipart_upload", url, **where, UploadId=row["UploadId"])


def _not_there(url: str, size: int) -> DataError:
    return DataError(f"{url}: the store does not hold the {size} bytes that were written to it; run again")
