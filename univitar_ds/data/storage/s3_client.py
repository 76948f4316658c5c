"""Sends requests to S3 and compatible stores. Only this module imports boto3, at the first request."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from typing import Any

from univitar_ds.data.storage.base import S3, ReplacedError, StorageSettings
from univitar_ds.data.storage.cache_dir import Version
from univitar_ds.data.storage.retry import Failure, RateLimiter, RetryPolicy
from univitar_ds.errors import DataError
from univitar_ds.extras import extra

CHUNK = 64 * 1024
"""Maximum number of bytes of one read from a connection."""
_CONNECT_S = 10.0
_POOL = 64
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_AGAIN, _NOT_AGAIN = {408, 429}, {501, 505}
"""Statuses below 500 that are retried, and statuses from 500 on that are not."""
_THROTTLED = {429, 503, 509, 529}
_AGAIN_CODES = {"RequestTimeout", "RequestTimeTooSkewed", "SlowDown", "BadDigest", "IncompleteBody"}
_OPEN: Mapping[str, Callable[[str, str], Any]] = {".json": open, ".json.gz": gzip.open}
_SERVICES = {"s3", "sts", "oidc", "portal.sso"}
"""Services that requests to S3 and their credentials use."""
_OTHER_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}


class Connection:
    """Client of one store, which retries requests (`RetryPolicy`). Thread-safe; one object per process."""

    def __init__(self, settings: StorageSettings) -> None:
        self._settings = settings
        self._limiter = RateLimiter()
        self._lock = threading.Lock()
        self._client: Any = None

    def call(self, operation: str, url: str, **parameters: Any) -> dict[str, Any]:
        """Returns the answer to one request, such as "head_object"; `url` is for messages.

        Raises: DataError if the request cannot succeed or does not within `give_up_s`; `__cause__` is boto3's error.
        """
        policy, errors = self._policy(url), _transport_errors()
        while True:
            try:
                return self._request(operation, url, parameters)
            except errors as error:
                policy.failed(self._failure(error, url))

    def stream(self, version: Version, start: int, end: int) -> Iterator[memoryview]:
        """Yields bytes [start, end) of an object in pieces.

        After a failure, continues at the next byte of the same version.
        Raises: DataError as `call` does, and if the object was replaced.
        """
        policy, errors = self._policy(version.url), _transport_errors()
        while start < end:
            try:
                with closing(self._body(version, start, end)) as body, body as raw:
                    policy.connected()
                    while start < end:
                        piece = raw.read1(min(CHUNK, end - start))  # `read` would wait for all bytes
                        if not piece:
                            raise OSError(f"the answer ended at byte {start} of {end}")
                        start += len(piece)
                        yield memoryview(piece)
                        if start < end:
                            policy.progress(len(piece))  # may raise, so the piece is yielded first
            except errors as error:
                policy.failed(self._failure(error, version.url))

    def _policy(self, url: str) -> RetryPolicy:
        return RetryPolicy(url, self._settings.give_up_s, self._limiter, self._settings.idle_timeout_s)

    def _request(self, operation: str, url: str, parameters: dict[str, Any]) -> dict[str, Any]:
        client = self._connected(url)
        self._limiter.wait()
        answer = getattr(client, operation)(**parameters)
        self._limiter.answered()
        return answer

    def _body(self, version: Version, start: int, end: int) -> Any:
        """Returns the body of a range request. Raises: DataError if the answer has another version or range."""
        parameters = {**address(version.url), "Range": f"bytes={start}-{end - 1}", "IfMatch": f'"{version.etag}"'}
        answer = self._request("get_object", version.url, parameters)
        found = answer.get("ContentRange", f"bytes 0-{end - 1}/{answer['ContentLength']}")
        first, _, total = found.removeprefix("bytes ").partition("/")
        if answer.get("ETag", "").strip('"') != version.etag or total not in (str(version.size), "*"):
            answer["Body"].close()
            raise changed(version.url)
        if first.partition("-")[0] != str(start):
            answer["Body"].close()
            raise DataError(
                f"{version.url}: the store answered bytes {first} to a request from byte {start} on; use another store"
            )
        return answer["Body"]

    def _connected(self, url: str) -> Any:
        with self._lock:
            if self._client is None:
                with extra("s3"):
                    import boto3
                    import botocore.session
                    from botocore.config import Config
                    from botocore.exceptions import BotoCoreError

                settings = self._settings
                custom = settings.endpoint_url or any(name in os.environ for name in _ENDPOINTS)
                config = Config(
                    connect_timeout=min(_CONNECT_S, settings.idle_timeout_s),
                    read_timeout=settings.idle_timeout_s,
                    tcp_keepalive=True,
                    max_pool_connections=_POOL,
                    retries={"total_max_attempts": 1, "mode": "standard"},  # `RetryPolicy` retries instead
                    s3={"addressing_style": "path"} if custom else {},
                    request_checksum_calculation="when_required",  # other stores do not support the new checksums
                    response_checksum_validation="when_required",
                )
                try:
                    core = botocore.session.get_session()
                    core.get_component("data_loader").file_loader = ServiceFiles()
                    session = boto3.Session(
                        botocore_session=core, profile_name=settings.profile, region_name=settings.region
                    )
                    self._client = session.client("s3", endpoint_url=settings.endpoint_url, config=config)
                except (BotoCoreError, ValueError) as error:
                    raise _unusable(url, error) from error
                _release_free_memory()
            return self._client

    def _failure(self, error: Exception, url: str) -> Failure:
        """Returns the reason for a retry, and the pause that the store asked for.

        Raises: DataError if a retry cannot help. Messages contain no text from the store, which could quote
        credentials.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            self._limiter.reached = True
            code, status = error.response["Error"].get("Code", ""), _status(error)
            if status in _AGAIN or code in _AGAIN_CODES or (status >= 500 and status not in _NOT_AGAIN):
                after = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("retry-after", "0")
                seconds = float(after) if after.isdigit() else 0.0
                return Failure(f"the store answered {status} {code}", status in _THROTTLED, seconds)
            raise refused(url, status, code) from error
        if isinstance(error, BotoCoreError) and not isinstance(error, _passing_errors()):
            raise _unusable(url, error) from error
        own = type(error) is OSError
        return Failure(str(error) if own else f"the connection failed ({type(error).__name__})")


class ServiceFiles:
    """Reads botocore's descriptions of services, as its `JSONFileLoader`, without what S3 does not need: the texts of
    documentation and the endpoints of other services.

    The client keeps them in memory, 15 MB for S3; these parts are half of it."""

    def exists(self, file_path: str) -> bool:
        return any(os.path.isfile(file_path + extension) for extension in _OPEN)

    def load_file(self, file_path: str) -> dict[str, Any] | None:
        """Returns the content of the file with this path without its extension; None if there is none."""
        for extension, opened in _OPEN.items():
            with suppress(FileNotFoundError), opened(file_path + extension, "rb") as stream:
                return json.loads(stream.read(), object_hook=_needed)
        return None


def _needed(part: dict[str, Any]) -> dict[str, Any]:
    if isinstance(part.get("documentation"), str):
        part["documentation"] = ""  # botocore expects the key
    if "partition" in part and isinstance(services := part.get("services"), dict):
        part["services"] = {name: services[name] for name in _SERVICES & services.keys()}
    return part


def _release_free_memory() -> None:
    """Returns memory that reading the descriptions took to the system, 2 MB, if the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def address(url: str) -> dict[str, str]:
    """Returns the request parameters `Bucket` and `Key` of s3://bucket/some/key. Raises: DataError without a bucket."""
    bucket, _, key = url.removeprefix(S3).partition("/")
    if not bucket:
        raise DataError(f"{url} names no bucket; write s3://BUCKET/PREFIX")
    return {"Bucket": bucket, "Key": key}


def changed(url: str) -> ReplacedError:
    """Returns the error for an object that was replaced."""
    return ReplacedError(
        f"{url}: the object was replaced during this run; restore the shard that this run was started with, or start "
        "a new run"
    )


def refused(url: str, status: int, code: str) -> DataError:
    """Returns the error for an answer that a retry would not change."""
    detail = f"the store answered {status} {code}".rstrip()
    if status == 412:
        return changed(url)
    if status == 404:
        what = {"NoSuchBucket": "bucket", "NoSuchKey": "object"}.get(code, "object or bucket")
        return DataError(f"{url}: there is no such {what}; check the address")
    if code == "InvalidObjectState":
        return DataError(f"{url}: the object is archived ({detail}); restore it to a storage class that can be read")
    if code in _OTHER_REGION or status in (301, 307):
        return DataError(f"{url}: the bucket is in another region ({detail}); name it by data.s3.region or --s3-region")
    if status in (401, 403):
        return DataError(
            f"{url}: access was refused ({detail}); check the credentials, data.s3.profile or --s3-profile, and the "
            "bucket's policy"
        )
    return DataError(f"{url}: the request was refused ({detail}); check the address and data.s3")


def _unusable(url: str, error: Exception) -> DataError:
    """Returns the error for settings that allow no request, with boto3's message only if it has no credentials."""
    from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

    if not isinstance(error, BotoCoreError):  # a ValueError for an invalid address
        return DataError(
            f"{url}: the store's address is invalid; write data.s3.endpoint_url or --s3-endpoint as http://HOST:PORT"
        )
    if isinstance(error, NoCredentialsError):
        return DataError(
            f"{url}: no credentials were found; set data.s3.profile or --s3-profile, or log in as boto3 expects it"
        )
    detail = str(error) if isinstance(error, PartialCredentialsError | ProfileNotFound) else type(error).__name__
    return DataError(f"{url}: no request can be sent ({detail}); check data.s3 and the credentials")


def status_of(error: DataError) -> int:
    """Returns the HTTP status of the answer that caused the error; 0 for another cause."""
    return _status(error.__cause__)


def _status(error: BaseException | None) -> int:
    response = getattr(error, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _passing_errors() -> tuple[type[Exception], ...]:
    """Errors of boto3 that a retry may resolve."""
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import CredentialRetrievalError, HTTPClientError, IncompleteReadError

    return (BotoConnectionError, CredentialRetrievalError, HTTPClientError, IncompleteReadError)


def _transport_errors() -> tuple[type[Exception], ...]:
    """Returns all errors of a request that are not bugs of this program. Raises: InstallationError without boto3."""
    with extra("s3"):
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

    return (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError)
