"""The destination of packing: a local folder, or a prefix on S3 with a local folder for unfinished shards."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from univitar_ds.atomic_write import move_into_place, replace_bytes
from univitar_ds.data.shards.manifest import PROGRESS_FILE, read_manifest
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import S3, SCHEMES, Storage, StorageSettings
from univitar_ds.data.writing.progress_log import SHARD_NAME
from univitar_ds.errors import DataError


class Destination(Protocol):
    """The location of shards and a manifest. `workspace` is a local folder for the progress log and unfinished shards.

    An entry of a shard is {"bytes", "sha256"}.
    """

    workspace: Path
    place: str

    def claim(self) -> None:
        """Marks the location as used for this folder. Raises: DataError if it has other content."""

    def names(self) -> set[str]:
        """Returns the names of the files at the location."""

    def holds(self, name: str, entry: dict[str, Any]) -> bool:
        """Whether a file exists and is complete."""

    def publish(self, partial: Path, name: str, entry: dict[str, Any]) -> None:
        """Moves a finished file from the workspace to the location under this name."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file atomically."""

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""

    def manifest(self) -> dict[str, Any]:
        """Returns the manifest at the location; {} if there is none that can be read."""


class LocalFolder:
    """A local folder of shards and their progress log. `open_progress_log` claims it."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.place = folder, str(folder)

    def claim(self) -> None:
        """Does nothing: the progress log is in the folder, and opening it claims the folder."""

    def names(self) -> set[str]:
        return {path.name for path in self.workspace.iterdir()}

    def holds(self, name: str, entry: dict[str, Any]) -> bool:
        path = self.workspace / name
        try:
            if path.stat().st_size != entry["bytes"]:
                return False
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]
        except FileNotFoundError:
            return False

    def publish(self, partial: Path, name: str, entry: dict[str, Any]) -> None:
        move_into_place(partial, self.workspace / name, durable=True)

    def write(self, name: str, content: bytes) -> None:
        replace_bytes(self.workspace / name, content, durable=True)

    def remove(self, name: str) -> None:
        (self.workspace / name).unlink(missing_ok=True)

    def manifest(self) -> dict[str, Any]:
        return _manifest(self.workspace)


class S3Prefix:
    """Objects under a prefix. A shard is written locally, uploaded, and removed locally after the upload.

    An object with the name of the progress log has a hash of the path of the packed source. It also shows that packing
    may be in progress.
    """

    def __init__(self, url: str, origin: str, settings: StorageSettings, state: Path | None) -> None:
        from univitar_ds.data.storage.s3 import S3Storage

        self._url = self.place = url.rstrip("/")
        storage = storage_for(self._url, settings)
        assert isinstance(storage, S3Storage)
        self._storage = storage
        self._origin = hashlib.sha256(os.fsencode(origin)).hexdigest()
        place = hashlib.sha256(f"{self._origin} {settings.endpoint_url} {self._url}".encode()).hexdigest()[:32]
        self.workspace = (state or _state_folder()) / place

    def claim(self) -> None:
        names = self.names()
        if PROGRESS_FILE not in names:
            if names:
                raise DataError(f"{self._url} contains {min(names)} but no packing log; choose another prefix")
            self.write(PROGRESS_FILE, json.dumps({"origin": self._origin}).encode())
        elif self._claimed_by() != self._origin:
            raise DataError(f"{self._url} holds shards packed from another folder; choose another prefix")

    def names(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self._storage.list(self._url)}

    def holds(self, name: str, entry: dict[str, Any]) -> bool:
        from univitar_ds.data.storage.s3_upload import holds

        return holds(self._storage, self._path(name), entry["bytes"], entry["sha256"])

    def publish(self, partial: Path, name: str, entry: dict[str, Any]) -> None:
        from univitar_ds.data.storage.s3_upload import put_file

        if not self.holds(name, entry):  # uploaded already if the log is lost or the last run ended before its entry
            put_file(self._storage, self._path(name), partial, entry["sha256"])
        partial.unlink()

    def write(self, name: str, content: bytes) -> None:
        from univitar_ds.data.storage.s3_upload import put_bytes

        put_bytes(self._storage, self._path(name), content)

    def remove(self, name: str) -> None:
        from univitar_ds.data.storage.s3_upload import remove

        remove(self._storage, self._path(name))

    def manifest(self) -> dict[str, Any]:
        return _manifest(self._url, self._storage)

    def _claimed_by(self) -> str | None:
        try:
            return json.loads(self._storage.read(self._path(PROGRESS_FILE)))["origin"]
        except (ValueError, KeyError, TypeError):
            return None

    def _path(self, name: str) -> str:
        return f"{self._url}/{name}"


def destination_of(
    out: str | Path, origin: str, settings: StorageSettings, state: Path | None
) -> LocalFolder | S3Prefix:
    """Returns the destination at `out`. `origin`: the path without links, or the address, of the source; `state`: the
    folder of all workspaces (None: in ~/.local/state).

    Raises: DataError for an address without a bucket or with an unsupported scheme.
    """
    scheme, separator, rest = str(out).partition("://")
    if not separator:
        return LocalFolder(Path(out))
    if f"{scheme}://" != S3:
        raise DataError(f"{out}: cannot write to {scheme}://; give {SCHEMES}")
    if not rest.strip("/"):
        raise DataError(f"{out} names no bucket; write s3://BUCKET/PREFIX")
    return S3Prefix(str(out), origin, settings, state)


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base, "univitar_ds", "pack")


def _manifest(folder: str | Path, storage: Storage | None = None) -> dict[str, Any]:
    """Returns the manifest in a folder; {} if there is none that can be read."""
    try:
        return read_manifest(folder, storage)
    except DataError:
        return {}


def shards_of(manifest: dict[str, Any]) -> set[str]:
    """Returns the names of the shards that a manifest lists."""
    return {row["file"] for row in manifest.get("shards", []) if SHARD_NAME.fullmatch(row["file"])}
