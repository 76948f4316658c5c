"""The temporary folder of a run: local copies of remote shards, and the pinned version of each remote file.

The process that created the folder holds a lock on it. The folder of a killed process is removed by the next process.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path

from univitar_ds.atomic_write import replacing
from univitar_ds.locked_folder import LockedFolder

_PREFIX = "univitar-ds-"
_making = threading.Lock()


def session_folder() -> str:
    """Returns this process's folder, which is created at the first call and removed at the end. Thread-safe."""
    with _making:
        return str(_folder_of(os.getpid()).path)


def remove_session_folder() -> None:
    """Removes this process's folder, for a process that ends without Python's exit handlers."""
    with _making:
        if _folder_of.cache_info().currsize:
            _folder_of(os.getpid()).remove()


class Pins:
    """The pinned version of each remote file, the first one found, which all processes of a run read."""

    def __init__(self, session: str) -> None:
        self._folder = Path(session, "pins")
        self._known: dict[str, tuple[str, int]] = {}
        self._shared: set[str] = set()

    def get(self, url: str) -> tuple[str, int] | None:
        """Returns ETag and size in bytes; None if no version is pinned."""
        found = self._known.get(url)
        if found is None:
            with suppress(FileNotFoundError):
                etag, size = json.loads(self._path(url).read_bytes())
                found = self._known[url] = (etag, size)
                self._shared.add(url)
        return found

    def set(self, url: str, etag: str, size: int) -> None:
        """Pins a version in this process."""
        self._known[url] = (etag, size)

    def share(self, url: str) -> None:
        """Shares the version with other processes. Called at the first read; most listed files are never read."""
        if url in self._shared:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(url), shared=True) as partial:
            partial.write_text(json.dumps(self._known[url]), encoding="utf-8")
        self._shared.add(url)

    def forget(self, url: str) -> None:
        """Unpins the version in all processes that have not read it yet."""
        self._known.pop(url, None)
        self._shared.discard(url)
        self._path(url).unlink(missing_ok=True)

    def _path(self, url: str) -> Path:
        return self._folder / _name(url)


def _name(url: str) -> str:
    return blake2b(url.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


@cache
def _folder_of(process: int) -> LockedFolder:
    return LockedFolder(Path(tempfile.gettempdir()), _PREFIX)
