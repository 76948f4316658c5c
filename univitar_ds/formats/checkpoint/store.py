"""Reads the checkpoints of a run that are on S3, which `training.checkpoint.s3_folder` writes.

    s3://bucket/prefix/<run>/step-00000200/{files of the ranks, manifest.json}     complete: has a manifest
    s3://bucket/prefix/<run>/latest, .../best                                      text: the name of a complete one

Files are copied to this machine before they are read, and compared with the manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from univitar_ds.config.schema import RunConfig
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.session import session_folder
from univitar_ds.errors import CheckpointError, DataError, writing
from univitar_ds.formats.checkpoint_dir import LATEST, MANIFEST, faults, read_manifest, step_of

_PIECE_BYTES, _THREADS = 32 << 20, 4
"""Bytes of one request for a part of a file, and number of such requests at once."""
_STEP = re.compile(r"step-\d{8,}")
_SMALL = 1 << 20
"""Maximum bytes of `latest`."""


def store_of(config: RunConfig) -> CheckpointStore | None:
    """Returns the store of a run's checkpoints; None if they are in the run's folder."""
    if config.checkpoint.folder is None:
        return None
    return CheckpointStore(f"{config.checkpoint.folder.rstrip('/')}/{config.name}", StorageSettings.of(config.data))


class CheckpointStore:
    """The checkpoints of one run below `url`. Raises: CheckpointError if the store cannot be read."""

    def __init__(self, url: str, settings: StorageSettings) -> None:
        from univitar_ds.data.storage.s3 import shared_storage  # imported here, because boto3 takes a second

        self.url = url
        self.storage = shared_storage(settings)

    def complete(self) -> list[str]:
        """Returns the names of the complete checkpoints, oldest first."""
        found = []
        with _reading():
            for path in self.storage.below(self.url):
                folder, _, name = path.removeprefix(f"{self.url}/").partition("/")
                if name == MANIFEST and _STEP.fullmatch(folder):
                    found.append(folder)
        return sorted(found, key=step_of)

    def latest(self) -> str | None:
        """Returns the name in `latest`, or that of the newest complete checkpoint if that one is not complete."""
        with _reading():
            version = self.storage.present(f"{self.url}/{LATEST}")
            if version is not None and version.size < _SMALL:
                pieces = self.storage.connection.stream(version, 0, version.size)
                name = b"".join(bytes(piece) for piece in pieces).decode(errors="replace").strip()
                if _STEP.fullmatch(name) and self.storage.present(f"{self.url}/{name}/{MANIFEST}") is not None:
                    return name
        names = self.complete()
        return names[-1] if names else None

    def checkpoint(self, name: str, folder: Path) -> StoredCheckpoint:
        """Returns a checkpoint whose files are copied into `folder / name` when they are needed."""
        return StoredCheckpoint(self, name, folder / name)

    def copied(self, name: str) -> Path:
        """Returns a folder with the whole checkpoint, which is removed when the process ends."""
        digest = hashlib.blake2b(self.url.encode(), digest_size=16).hexdigest()
        stored = self.checkpoint(name, Path(session_folder(), "checkpoints", digest))
        for file in stored.manifest:
            stored.fetch(file)
        return stored.folder


class StoredCheckpoint:
    """A checkpoint in a store, and its local copy in `folder`, which gets files as they are fetched."""

    def __init__(self, store: CheckpointStore, name: str, folder: Path) -> None:
        self.url, self.folder, self._storage = f"{store.url}/{name}", folder, store.storage
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._copy(MANIFEST)
        self.manifest = read_manifest(folder)
        self._fetched: set[str] = set()

    def fetch(self, name: str) -> Path:
        """Returns the local copy of a file. Raises: CheckpointError if it differs from the manifest."""
        path = self.folder / name
        if name in self._fetched:
            return path
        if name not in self.manifest:
            raise CheckpointError(f"{self.url}/{name} is not a file of this checkpoint; {self._remedy()}")
        entries = {name: self.manifest[name]}
        if faults(self.folder, entries):  # not there yet, or from a checkpoint that was replaced
            self._copy(name)
            if found := faults(self.folder, entries):
                raise CheckpointError(f"{self.url} is damaged: {'; '.join(found)}; {self._remedy()}")
        self._fetched.add(name)
        return path

    def _remedy(self) -> str:
        return f"remove its {MANIFEST} and resume again, which takes the newest other checkpoint there"

    def _copy(self, name: str) -> None:
        url, path = f"{self.url}/{name}", self.folder / name
        with _reading(), writing(path):
            version = self._storage.present(url)
            if version is None:
                raise CheckpointError(f"{url} is missing; {self._remedy()}")
            partial = path.with_name(f".{name}.partial")
            file = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)

            def receive(begin: int) -> None:
                for piece in self._storage.connection.stream(version, begin, min(begin + _PIECE_BYTES, version.size)):
                    begin += os.pwrite(file, piece, begin)

            try:
                with ThreadPoolExecutor(_THREADS, "download") as threads:
                    list(threads.map(receive, range(0, version.size, _PIECE_BYTES)))
            finally:
                os.close(file)
            os.replace(partial, path)


@contextmanager
def _reading() -> Iterator[None]:
    """Wraps code that reads a store. Raises: CheckpointError instead of the store's DataError."""
    try:
        yield
    except DataError as error:
        raise CheckpointError(str(error)) from error
