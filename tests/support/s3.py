"""An S3 store on loopback, and a proxy that causes the faults of networks and stores.

    with s3_server() as server:
        url = server.upload(folder, "some/prefix")                  # s3://shards/some/prefix
        settings = StorageSettings(endpoint_url=server.url)
        with faulty(server, some_of(["drop", "throttle"], 0.2)) as proxy:
            settings = StorageSettings(endpoint_url=proxy.url, idle_timeout_s=0.3, give_up_s=20)

The store is moto's server in a separate process. While it runs, the environment of this process and its children has
credentials for it.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BUCKET = "shards"
SECRET = "loopback-secret-that-no-log-may-show"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "loopback-key-id",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
_SERVE = """
import logging, sys
from werkzeug.serving import WSGIRequestHandler, make_server
from moto.server import DomainDispatcherApplication, create_backend_app
logging.getLogger("werkzeug").disabled = True
WSGIRequestHandler.protocol_version = "HTTP/1.1"
server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""

_ENCRYPTED = b"-encrypted"
"""Suffix of an ETag that is not an MD5 sum."""

Plan = Callable[["Request"], str | None]
"""The fault for a request: None, one of `FAULTS`, "status N", or "etag E".

"etag E": the store ignores If-Match and returns the ETag E, or none if E is empty.
"""


@dataclass(frozen=True)
class Request:
    """A request to the proxy. `number` counts from 0 in order of arrival; `key` is without the bucket."""

    number: int
    method: str
    key: str
    query: str
    range: str | None
    if_match: str | None = None
    if_none_match: str | None = None
    region: str | None = None
    """The region for which the request is signed."""


class S3Server:
    """A store with one bucket. The methods do not use the proxy."""

    def __init__(self, url: str) -> None:
        import boto3

        self.url = url
        keys = {
            "aws_access_key_id": ENVIRONMENT["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": ENVIRONMENT["AWS_SECRET_ACCESS_KEY"],
        }
        self.client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, content: bytes) -> str:
        """Write an object; returns its address."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=content)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def upload(self, folder: Path, prefix: str, pattern: str = "*") -> str:
        """Copy the files of a folder, with pattern "**/*" at any depth; returns the prefix's address."""
        for path in sorted(Path(folder).glob(pattern)):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [row["Key"] for page in pages for row in page.get("Contents", ())]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Starts an empty store in a separate process; ready in about a second."""
    saved = {name: os.environ.get(name) for name in (*ENVIRONMENT, "AWS_PROFILE", "AWS_SESSION_TOKEN")}
    process = subprocess.Popen([sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "moto's server did not start; is moto[server] installed?"
        os.environ.update(ENVIRONMENT)
        os.environ.pop("AWS_PROFILE", None)
        os.environ.pop("AWS_SESSION_TOKEN", None)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


FAULTS = {
    "throttle": "503 SlowDown instead of an answer",
    "refuse": "429 with Retry-After instead of an answer",
    "error": "500 instead of an answer",
    "gone": "404 NoSuchUpload instead of an answer",
    "hang": "no answer until the client closes the connection",
    "drop": "half of the body, then the connection is reset",
    "cut": "half of the body, then the connection is closed normally",
    "stall": "half of the body, then nothing until the client closes the connection",
    "trickle": "half of the body, then a byte every 20 ms",
    "short": "half of the body, with a Content-Length of that half",
    "reset": "the connection is reset before any answer",
    "lost": "the store executes the request, but the connection is reset before the answer",
    "flip": "one bit of the request's body is changed",
    "unpinned": "the store ignores If-Match",
    "encrypt": "the store encrypts: it checks Content-MD5 and returns an ETag that is not an MD5 sum",
    "encrypt flip": "the store encrypts, and one bit of the request's body is changed",
}


def some_of(kinds: Sequence[str], rate: float, seed: int = 0, only: Callable[[Request], bool] | None = None) -> Plan:
    """A fault of one of the kinds for a share of the requests, chosen by `seed` and the request's number."""

    def plan(request: Request) -> str | None:
        rng = random.Random(f"{seed} {request.number}")
        wanted = rng.random() < rate and (only is None or only(request))
        return rng.choice(kinds) if wanted else None

    return plan


def first_of(kind: str, times: int = 1, only: Callable[[Request], bool] | None = None) -> Plan:
    """The fault for the first `times` requests (of those that `only` selects), then none."""
    left = [times]

    def plan(request: Request) -> str | None:
        if left[0] and (only is None or only(request)):
            left[0] -= 1
            return kind
        return None

    return plan


@dataclass
class FaultProxy:
    """Records every request and counts the faults."""

    url: str
    requests: list[Request] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)

    def bodies(self, key: str) -> list[Request]:
        """The GETs of an object."""
        return [request for request in self.requests if request.method == "GET" and request.key == key]


@contextmanager
def faulty(server: S3Server, plan: Plan) -> Iterator[FaultProxy]:
    """Runs a proxy to the store that causes the faults of `plan`."""
    listener = socket.create_server(("127.0.0.1", 0))
    proxy = FaultProxy(f"http://127.0.0.1:{listener.getsockname()[1]}")
    open_sockets: set[socket.socket] = set()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                open_sockets.add(client)
                threading.Thread(target=_serve, args=(client, server.url, plan, proxy, lock), daemon=True).start()

    lock = threading.Lock()
    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for client in open_sockets:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)


def _serve(client: socket.socket, upstream: str, plan: Plan, proxy: FaultProxy, lock: threading.Lock) -> None:
    """Serves the requests of one connection in order."""
    store = http.client.HTTPConnection(urlsplit(upstream).netloc)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError, http.client.HTTPException), client, client.makefile("rb") as stream:
        while line := stream.readline():
            method, target, _ = line.decode().split()
            headers = {name.lower(): value for name, value in _headers(stream)}
            if headers.get("expect"):
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = stream.read(int(headers.get("content-length", 0)))
            path, _, query = target.partition("?")
            with lock:
                key = path.removeprefix(f"/{BUCKET}").removeprefix("/")
                scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", headers.get("authorization", ""))
                request = Request(
                    len(proxy.requests),
                    method,
                    key,
                    query,
                    headers.get("range"),
                    headers.get("if-match"),
                    headers.get("if-none-match"),
                    scope and scope[1],
                )
                proxy.requests.append(request)
                fault = plan(request)
                if fault:
                    proxy.faults[fault] += 1
            if not _answer(client, store, fault, (method, target, body, headers)):
                return


def _headers(stream: Any) -> Iterator[tuple[str, str]]:
    while (line := stream.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        yield name, value.strip()


def _answer(client: socket.socket, store: http.client.HTTPConnection, fault: str | None, asked: tuple) -> bool:
    """Answer one request with or without a fault; returns whether the connection stays open."""
    if fault == "throttle":
        return _send(client, "503 Slow Down", b"<Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>")
    if fault == "refuse":
        return _send(client, "429 Too Many Requests\r\nRetry-After: 0", b"<Error><Code>TooMany</Code></Error>")
    if fault == "error":
        return _send(client, "500 Internal Server Error", b"<Error><Code>InternalError</Code></Error>")
    if fault is not None and fault.startswith("status "):
        return _send(client, f"{fault.removeprefix('status ')} Odd", b"")
    if fault == "gone":
        return _send(client, "404 Not Found", b"<Error><Code>NoSuchUpload</Code></Error>")
    if fault == "hang":
        return _wait_for_close(client)
    if fault == "reset":
        return _reset(client)
    method, target, body, headers = asked
    encrypts = fault in ("encrypt", "encrypt flip")
    etag = fault.removeprefix("etag ") if fault is not None and fault.startswith("etag ") else None
    if fault in ("flip", "encrypt flip") and body:
        body = bytes([body[0] ^ 1]) + body[1:]
    if encrypts and headers.pop("content-md5", None) not in (None, b64encode(hashlib.md5(body).digest()).decode()):
        return _send(client, "400 Bad Request", b"<Error><Code>BadDigest</Code></Error>")
    if encrypts and method == "POST":  # the parts of an upload, by the ETags that were given out for them
        body = body.replace(_ENCRYPTED, b"")
        headers["content-length"] = str(len(body))
    if fault == "unpinned" or etag is not None:
        headers.pop("if-match", None)
    store.request(method, target, body, headers)
    response = store.getresponse()
    content = response.read()
    if fault == "lost":
        return _reset(client)
    half = len(content) // 2 if fault in ("drop", "cut", "stall", "trickle", "short") else len(content)
    promised = half if fault == "short" else len(content)
    if method == "HEAD":
        promised = int(response.headers.get("content-length", 0))
    if encrypts:
        response.headers["x-amz-server-side-encryption"] = "aws:kms"
        if method == "PUT":
            etag = response.headers.get("etag", "").replace('"', "") + _ENCRYPTED.decode()
    if etag is not None:
        del response.headers["etag"]
        if etag:
            response.headers["etag"] = etag
    client.sendall(_head(response, promised) + content[:half])
    if fault == "drop":
        return _reset(client)
    if fault == "stall":
        return _wait_for_close(client)
    if fault == "trickle":
        return _slowly(client, content[half:])
    return fault != "cut"


def _head(response: http.client.HTTPResponse, length: int) -> bytes:
    kept = [
        f"{name}: {value}\r\n"
        for name, value in response.headers.items()
        if not re.fullmatch("content-length|transfer-encoding|connection", name, re.IGNORECASE)
    ]
    length_line = "" if response.status == 204 else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {response.status} {response.reason}\r\n{''.join(kept)}{length_line}\r\n".encode("latin-1")


def _send(client: socket.socket, status: str, body: bytes) -> bool:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return True


def _wait_for_close(client: socket.socket) -> bool:
    select.select([client], [], [])  # readable once the client closes or `faulty` shuts the socket down
    return False


def _slowly(client: socket.socket, content: bytes) -> bool:
    for byte in content:
        if select.select([client], [], [], 0.02)[0]:  # the client closed the connection
            return False
        client.sendall(bytes([byte]))
    return True


def _reset(client: socket.socket) -> bool:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False
