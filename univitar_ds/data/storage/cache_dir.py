"""A folder of local copies of remote files, shared by processes and limited in size.

A copy is named {id}-{bytes}.tar.part during its download and {id}-{bytes}.tar when it is complete; the id is a hash of
store, address and ETag. The downloading process holds the lock {id}-{bytes}.tar.lock; if it is killed, the lock is
released and another process continues the download. A reader holds a shared lock on the copy itself. Data is only
appended to a part, so the size of a part is the position of its download.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from univitar_ds.atomic_write import move_into_place
from univitar_ds.errors import DataError

_log = logging.getLogger(__name__)

_COPY = re.compile(r"([0-9a-f]{32}-(\d+)\.tar)(\.part)?")
_KEPT_FREE = 0.1
"""Share of the free disk space that is never used, even if `limit_bytes` would allow it."""


@dataclass(frozen=True)
class Version:
    """A version of an object, with its `size` in bytes. `store` distinguishes stores with equal object names."""

    url: str
    etag: str
    size: int
    store: str = ""

    @property
    def name(self) -> str:
        """The name of a complete copy."""
        identity = f"{self.store}\0{self.url}\0{self.etag}".encode("utf-8", "surrogateescape")
        return f"{blake2b(identity, digest_size=16).hexdigest()}-{self.size}.tar"


class CacheDir:
    """A folder of copies that take at most `limit_bytes` bytes in total, or more if the copies in use need more.

    Methods raise OSError; `failed` converts it to a DataError.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._warned = False

    def whole(self, version: Version) -> bool:
        """Whether there is a complete copy."""
        return os.path.exists(self._whole(version))

    def open(self, version: Version) -> int | None:
        """Returns a descriptor of the copy, complete or not; None if there is none. An open copy is not removed."""
        whole, part = self._whole(version), self._part(version)
        for path in (whole, part, whole):  # a part may become complete between two attempts
            try:
                copy = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            fcntl.flock(copy, fcntl.LOCK_SH)
            state = os.fstat(copy)
            if state.st_nlink and not _torn(path, state, version.size):
                return copy
            os.close(copy)
        return None

    def begin(self, version: Version, *, needed: bool = True) -> tuple[int, int] | None:
        """Returns descriptors of the part to append to and of its lock. The caller closes the part and then the lock.

        None if the copy is complete, if another process downloads it, or if it is not `needed` yet and the folder is
        full.
        """
        self._folder.mkdir(exist_ok=True)  # no parents: a session folder that was removed must stay removed
        lock = _try_lock(self._lock(version.name))
        if lock is None:
            return None
        try:
            part = self._begun(version, needed)
        except OSError:
            os.close(lock)
            raise
        if part is None:
            os.close(lock)
            return None
        return part, lock

    def finish(self, version: Version) -> None:
        """Renames a part that has all bytes to the complete copy."""
        move_into_place(self._part(version), self._whole(version), durable=True)  # survives a power failure

    def used(self, copy: int) -> None:
        """Records that the copy is used now. The least recently used copies are removed first."""
        with suppress(PermissionError):  # another user's copy
            os.utime(copy, ns=(time.time_ns(), os.fstat(copy).st_mtime_ns))

    def failed(self, error: OSError) -> DataError:
        """Returns the DataError for an error of this folder."""
        return DataError(
            f"{self._folder}: local copies cannot be stored there ({error.strerror or error}); "
            "set data.cache.folder to another folder, or lower data.cache.limit_gb"
        )

    # The paths are strings: every read builds one, and a Path would intern its parts.
    def _whole(self, version: Version) -> str:
        return f"{self._folder}/{version.name}"

    def _part(self, version: Version) -> str:
        return f"{self._whole(version)}.part"

    def _lock(self, name: str) -> str:
        return f"{self._folder}/{name}.lock"

    def _begun(self, version: Version, needed: bool) -> int | None:
        """Returns the part to append to, after making room; None if it is complete, or unneeded and too large."""
        whole, part = self._whole(version), self._part(version)
        with suppress(FileNotFoundError):
            if not _torn(whole, os.stat(whole), version.size):
                return None
            os.unlink(whole)
        with open(self._folder / "room.lock", "a", encoding="utf-8") as room_lock:
            fcntl.flock(room_lock, fcntl.LOCK_EX)
            if os.path.exists(part) and _torn(part, os.stat(part), version.size):
                os.unlink(part)
            if not os.path.exists(part) and not self._make_room(version.size, needed) and not needed:
                return None
            return os.open(part, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)

    def _make_room(self, wanted: int, needed: bool) -> bool:
        """Removes copies without readers, least recently used first. Returns whether `wanted` more bytes then fit."""
        copies = self._kept()
        kept = sum(promised for _, _, promised, _ in copies.values())
        on_disk = sum(blocks for _, _, _, blocks in copies.values())
        limit = min(self._limit, on_disk + int(shutil.disk_usage(self._folder).free * (1 - _KEPT_FREE)))
        for _, name, promised, _ in sorted(copies.values()):
            if kept + wanted <= limit:
                return True
            if self._evicted(name):
                kept -= promised
        fits = kept + wanted <= limit
        if not fits and needed and not self._warned:
            self._warned = True
            _log.warning(
                "%s: the shards in use take %.2f GB, above the limit of %.2f GB; raise "
                "data.cache.limit_gb or free some space",
                self._folder,
                (kept + wanted) / 1e9,
                limit / 1e9,
            )
        return fits

    def _kept(self) -> dict[str, tuple[int, str, int, int]]:
        """Returns, by name of the complete copy: (time of last use, present name, final bytes, bytes on disk)."""
        copies = {}
        for entry in os.listdir(self._folder):
            match = _COPY.fullmatch(entry)
            if match is None:
                continue
            whole, promised, _ = match.groups()
            for name in dict.fromkeys((entry, whole)):  # a part may have become complete since `listdir`
                with suppress(FileNotFoundError):
                    state = os.stat(f"{self._folder}/{name}")
                    copies[whole] = (state.st_atime_ns, name, int(promised), state.st_blocks * 512)
                    break
        return copies

    def _evicted(self, name: str) -> bool:
        """Removes a copy unless a process reads or downloads it. Returns whether it was removed."""
        path, lock_path = f"{self._folder}/{name}", self._lock(name.removesuffix(".part"))
        lock = _try_lock(lock_path)
        if lock is None:
            return False
        try:
            copy = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(copy)
            os.unlink(lock_path)
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            os.close(lock)
        return True


def _torn(path: str, state: os.stat_result, size: int) -> bool:
    """Whether a copy is invalid: wrong in size if complete, else too large or written before the last boot."""
    if path.endswith(".part"):
        started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return state.st_size > size or state.st_mtime < started
    return state.st_size != size


def _try_lock(path: str) -> int | None:
    """Returns a descriptor that holds the lock; None if another process holds the lock."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # 0: the last holder removed the file, and there may be a new file
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None
