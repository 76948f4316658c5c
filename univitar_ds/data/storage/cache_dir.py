"""A folder of local copies of remote files, shared by processes and kept below a size.

A copy is {id}-{bytes}.tar.part while it is fetched and {id}-{bytes}.tar when it is whole; the id follows from
address and version, so another version is another file. Processes agree through locks that end with their holder:
{id}-{bytes}.tar.lock belongs to the process that fetches, and who goes on after it has been killed; a shared lock on
the copy itself says that somebody is reading it. A part is only ever appended to, so its size says how far it is.
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
"""Share of the free space that is left to others, whatever the limit is."""


@dataclass(frozen=True)
class Version:
    """One version of one object, `size` in bytes; `store` distinguishes stores that use the same names."""

    url: str
    etag: str
    size: int
    store: str = ""

    @property
    def name(self) -> str:
        identity = f"{self.store}\0{self.url}\0{self.etag}".encode("utf-8", "surrogateescape")
        return f"{blake2b(identity, digest_size=16).hexdigest()}-{self.size}.tar"


class CacheDir:
    """The copies in `folder`, at most `limit_bytes` of them unless more are in use at once.

    Whatever the system refuses is an OSError here; `failed` makes a sentence of it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._warned = False

    def whole(self, version: Version) -> bool:
        return os.path.exists(self._whole(version))

    def open(self, version: Version) -> int | None:
        """A descriptor of the copy, whole or growing; while it is open, nobody removes the copy."""
        whole, part = self._whole(version), self._part(version)
        for path in (whole, part, whole):  # a part may become whole between the first look and the second
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
        """Descriptors of a part to append to and of the lock that comes with it; the caller closes both, part first.

        None if the copy is whole, or another process is fetching it, or it is not `needed` yet and there is no room.
        """
        self._folder.mkdir(exist_ok=True)  # but not what it lies in, which goes with the session
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
        """The part has all bytes: from now on it is the copy."""
        move_into_place(self._part(version), self._whole(version), durable=True)  # trusted after a power cut too

    def used(self, copy: int) -> None:
        """The copy is being used: it will be among the last to go."""
        with suppress(PermissionError):  # another user's copy
            os.utime(copy, ns=(time.time_ns(), os.fstat(copy).st_mtime_ns))

    def failed(self, error: OSError) -> DataError:
        return DataError(
            f"{self._folder}: local copies cannot be kept there ({error.strerror or error}); "
            "give data.cache.folder another place, or lower data.cache.limit_gb"
        )

    # Asked for with every piece that is read. Text, because a Path keeps its parts in Python's table of all names.
    def _whole(self, version: Version) -> str:
        return f"{self._folder}/{version.name}"

    def _part(self, version: Version) -> str:
        return f"{self._whole(version)}.part"

    def _lock(self, name: str) -> str:
        return f"{self._folder}/{name}.lock"

    def _begun(self, version: Version, needed: bool) -> int | None:
        """The file to append to, after making room for it; None if the copy is whole, or may wait and has no room."""
        whole, part = self._whole(version), self._part(version)
        with suppress(FileNotFoundError):
            if not _torn(whole, os.stat(whole), version.size):
                return None
            os.unlink(whole)
        with open(self._folder / "room.lock", "a", encoding="utf-8") as everybody:
            fcntl.flock(everybody, fcntl.LOCK_EX)
            if os.path.exists(part) and _torn(part, os.stat(part), version.size):
                os.unlink(part)
            if not os.path.exists(part) and not self._make_room(version.size, needed) and not needed:
                return None
            return os.open(part, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)

    def _make_room(self, wanted: int, needed: bool) -> bool:
        """Remove copies that nobody reads, those unused for longest first; whether `wanted` more bytes then fit."""
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
                "%s: the shards being read at once take %.2f GB, above the limit of %.2f GB; raise "
                "data.cache.limit_gb or free some space",
                self._folder,
                (kept + wanted) / 1e9,
                limit / 1e9,
            )
        return fits

    def _kept(self) -> dict[str, tuple[int, str, int, int]]:
        """By the name of the whole copy: when it was last used, its name now, its bytes when whole and now."""
        copies = {}
        for found in os.listdir(self._folder):
            match = _COPY.fullmatch(found)
            if match is None:
                continue
            whole, promised, _ = match.groups()
            for name in dict.fromkeys((found, whole)):  # a part may have become whole since its name was read
                with suppress(FileNotFoundError):
                    state = os.stat(f"{self._folder}/{name}")
                    copies[whole] = (state.st_atime_ns, name, int(promised), state.st_blocks * 512)
                    break
        return copies

    def _evicted(self, name: str) -> bool:
        """Remove a copy unless somebody reads or fetches it."""
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
    """Whether a copy cannot be trusted: of a wrong size, or a part from before the machine was started."""
    if path.endswith(".part"):
        started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return state.st_size > size or state.st_mtime < started
    return state.st_size != size


def _try_lock(path: str) -> int | None:
    """A descriptor that holds the lock; None if somebody else does."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else its last holder has removed it, and there may be a new one
            return lock
    except BlockingIOError:
        pass
    os.close(lock)
    return None
