"""Bytes of files by address. Everything that reads shards goes through this one interface.

Only this module knows what kind of place a path points to.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from univitar_ds.errors import DataError, SampleError

AT_ONCE = 16
"""Pieces asked for at a time: a remote store answers late, but many at once."""
_FILES_OF_OTHERS = 512
"""What is left to the rest of the process, which opens files, sockets and pipes later."""
S3 = "s3://"
SCHEMES = "a local path or an s3:// address"
_ELSEWHERE = (
    (("file",), ": leave file:// out"),
    (("hf",), "; download the data set first (hf download) and give the folder"),
    (("http", "https"), "; download the shards first, or give the s3:// address of what lies in an S3 store"),
    (("gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs"), "; copy the shards to a disk or to a store that speaks S3"),
)
"""Schemes of other places, and what to do."""


@dataclass(frozen=True)
class StorageSettings:
    """How remote files are reached and kept; `config.data.S3Config` and `CacheConfig` say what each means.

    `session` is a folder that the processes of one run share, see `shared`.
    """

    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    idle_timeout_s: float = 20.0
    give_up_s: float = 300.0
    prefetch_shards: int = 1
    cache_folder: str | None = None
    cache_limit_gb: float = 20.0
    session: str | None = None

    @classmethod
    def of(cls, data: Any) -> StorageSettings:
        """Those of the `data` section of a run file."""
        s3, cache = data.s3, data.cache
        return cls(
            s3.endpoint_url,
            s3.profile,
            s3.region,
            s3.idle_timeout_s,
            s3.give_up_s,
            s3.prefetch_shards,
            None if cache.folder is None else os.path.abspath(cache.folder),
            cache.limit_gb,
        )

    def shared(self) -> StorageSettings:
        """The same for other processes of this run: they find the local copies that this one makes.

        Makes a temporary folder, which is removed when this process ends.
        """
        from univitar_ds.data.session import session_folder

        return self if self.session else replace(self, session=session_folder())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> StorageSettings:
        return cls(**document)


_Asked, _Answered = TypeVar("_Asked"), TypeVar("_Answered")
LOCAL = StorageSettings()
"""Enough for local files, and for S3 where boto3 finds everything by itself."""


class Storage(Protocol):
    """Read-only access to files. Every failure is a DataError that names the file."""

    def open(self, path: str) -> BinaryIO:
        """A readable and seekable stream from the first byte on, made for reading forward."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""

    def read(self, path: str) -> bytes:
        """A whole small file."""

    def size(self, path: str) -> int:
        """Size in bytes."""

    def exists(self, path: str) -> bool:
        """Whether there is a file, or a folder, of this name."""

    def list(self, prefix: str) -> Sequence[str]:
        """Paths of the files directly in the folder `prefix`, sorted by name."""

    def prefetch(self, paths: Sequence[str]) -> None:
        """A hint that these will be opened next, in this order."""


class LocalStorage:
    """Files of this machine or of a mounted file system."""

    def open(self, path: str) -> BinaryIO:
        try:
            return open_regular(path)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        assert min(offset, length) >= 0, (offset, length)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # half the time of a file object
            try:
                return _exactly(file, path, offset, length)
            finally:
                os.close(file)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, path: str) -> bytes:
        try:
            with open_regular(path) as stream:
                return stream.read()
        except OSError as error:
            raise _unreadable(path, error) from error

    def size(self, path: str) -> int:
        try:
            state = os.stat(path)
            _check_regular(path, state)
            return state.st_size
        except OSError as error:
            raise _unreadable(path, error) from error

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def list(self, prefix: str) -> Sequence[str]:
        try:
            with os.scandir(prefix) as entries:  # it knows what is a file: no question for each of 40,000
                return sorted([str(Path(prefix, entry.name)) for entry in entries if entry.is_file()])
        except OSError as error:
            raise _unreadable(prefix, error) from error

    def prefetch(self, paths: Sequence[str]) -> None:
        """The system reads ahead by itself."""


def at_once(
    work: Callable[[_Asked], _Answered], pieces: Sequence[_Asked], storages: Iterable[Storage], most: int = AT_ONCE
) -> Iterator[_Answered]:
    """What `work` makes of each piece, in order: up to `most` at a time unless all storages are local.

    Those answer at once, and every thread would leave a heap of its own behind.
    """
    if most <= 1 or all(isinstance(storage, LocalStorage) for storage in storages):
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(most) as threads:
        yield from threads.map(work, pieces)


def allow_open_files(count: int) -> None:
    """Let this process have so many more files open, as far as its hard limit goes; many systems begin with 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + len(os.listdir("/proc/self/fd")) + _FILES_OF_OTHERS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_regular(path: str | Path) -> BinaryIO:
    """A local file for reading. Raises: OSError, also for pipes and devices: they may have no end or never answer."""
    return open(path, "rb", opener=_regular)


def read_file(path: Path, most_bytes: int, limit: str) -> bytes:
    """A whole regular file; `limit` ends the sentence about one with more than `most_bytes`. Raises: SampleError."""
    try:
        with open_regular(path) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length > most_bytes:
                raise SampleError("too_large", f"the file has {length} bytes{limit}")
            return stream.read()
    except OSError as error:
        raise SampleError("unreadable", f"the file cannot be read: {error.strerror}") from error


def _regular(path: str | Path, flags: int) -> int:
    """A descriptor, as an opener gives it. Raises: OSError for what is neither a regular file nor a folder."""
    file = os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for one who writes into it
    try:
        _check_regular(path, os.fstat(file))
    except OSError:
        os.close(file)
        raise
    return file


def _check_regular(path: str | Path, state: os.stat_result) -> None:
    """Folders pass: reading one is an error with a name of its own."""
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def storage_for(url: str, settings: StorageSettings = LOCAL) -> Storage:
    """The storage that serves `url`; its methods take the same url. One object per process and settings.

    Raises: DataError for a scheme that nothing here reads.
    """
    if url.startswith(S3):
        return _s3_storage(settings, os.getpid())
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


@cache
def _s3_storage(settings: StorageSettings, process: int) -> Storage:
    """A forked process (`process` is its number) must not go on with its parent's connections."""
    from univitar_ds.data.s3 import S3Storage

    return S3Storage(settings)


def _exactly(file: int, path: str, offset: int, length: int) -> bytes:
    """One read may return less than asked for; the end of the file before `length` bytes is an error."""
    parts = []
    missing = length
    while missing:
        part = os.pread(file, missing, offset + length - missing)
        if not part:
            raise DataError(
                f"{path}: ends at byte {offset + length - missing}, but {length} bytes were expected from byte "
                f"{offset} on; the file was cut or replaced while it was in use: restore it or pack it again"
            )
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _unreadable(path: str, error: OSError) -> DataError:
    if error.errno == errno.EMFILE:
        remedy = "every lane keeps a shard of each source open: raise the limit (ulimit -n) or give fewer sources"
    else:
        remedy = "check the path and its permissions"
    return DataError(f"{path}: cannot be read ({error.strerror or error}); {remedy}")
