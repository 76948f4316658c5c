"""The progress log of packing: a line for each examined file and each written shard.

An interrupted packing continues from it. It stays with the shards, so that packing again examines only files that have
changed.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from univitar_ds.atomic_write import replace_bytes
from univitar_ds.data.importing.rows import Row
from univitar_ds.data.shards.manifest import PROGRESS_FILE
from univitar_ds.data.writing.examine import MediaInfo
from univitar_ds.errors import DataError, writing

LOCK = ".pack.lock"
EXTRACTED = ".pack.media"
"""Name of the file with the media of tables; see `extract`."""
SHARD_NAME = re.compile(r".+-(image|video)-\d{6}\.tar")
_PARTIAL = re.compile(rf"\.({SHARD_NAME.pattern}|manifest\.json|pack\.jsonl)\.partial")
_FIRST_PARTIAL = ".pack.jsonl.partial"
"""Name of the partial file of a first log. Another process may be writing it, or was killed while it did."""
_VERSION = 2
"""Version of the entries. If it differs, every file is examined again."""


class InUseError(DataError):
    """Another process is packing into the folder."""


def wait_until_free(out: Path) -> None:
    """Waits until no other process packs into `out`, without a limit of time.

    The operating system releases the lock of a process that has ended for any reason.
    """
    with writing(out), (out / LOCK).open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


class ProgressLog:
    """Results of files and shards of one output folder. Open with `open_progress_log`."""

    def __init__(
        self, path: Path, header: dict[str, Any], entries: dict[str, dict[str, Any]], shards: set[str] | None = None
    ) -> None:
        self._path, self._header, self._entries = path, header, entries
        self.shards = shards or set()
        """Names of all shards that were begun or written here, including those of other versions of the decoders."""
        self._stream: TextIO = self._rewritten()

    def info(self, row: Row, stamp: list[int], verify: bool) -> MediaInfo | None:
        """Returns the result for a file; None if it is unknown or its stamp (size, modification time) has changed."""
        entry = self._entries.get(f"file {row.file}")
        if entry is None or [entry["stamp"], entry["kind"], entry["verify"]] != [stamp, row.kind, verify]:
            return None
        return MediaInfo(**entry["finding"])

    def add_info(self, row: Row, stamp: list[int], verify: bool, info: MediaInfo) -> None:
        self._add(f"file {row.file}", {"stamp": stamp, "kind": row.kind, "verify": verify, "finding": asdict(info)})

    def shard(self, name: str, plan: str) -> dict[str, Any] | None:
        """Returns size and hash of the shard if it was written by this plan, else None."""
        entry = self._entries.get(f"shard {name}")
        return entry if entry is not None and entry["plan"] == plan else None

    def extracted(self, file: str, stamp: list[Any]) -> tuple[int, int] | None:
        """Returns the first byte and length of media of a table in the file of extracted media; None if it is not
        there, or its table (size, modification time) has changed."""
        entry = self._entries.get(f"media {file}")
        return None if entry is None or entry["stamp"] != stamp else (entry["offset"], entry["length"])

    def extracted_end(self) -> int:
        """Returns the number of bytes of the file of extracted media that are in use."""
        return max((e["offset"] + e["length"] for k, e in self._entries.items() if k.startswith("media ")), default=0)

    def forget_extracted(self) -> None:
        """Removes the entries of extracted media, whose file is gone or too short."""
        entries = {key: entry for key, entry in self._entries.items() if not key.startswith("media ")}
        if len(entries) < len(self._entries):
            self._replace(entries)

    def add_extracted(self, file: str, stamp: list[Any], offset: int, length: int) -> None:
        self._add(f"media {file}", {"stamp": stamp, "offset": offset, "length": length})

    def copied(self) -> set[str]:
        """Returns the names of all objects that were copied from S3."""
        return {key.removeprefix("copy ") for key in self._entries if key.startswith("copy ")}

    def copied_version(self, name: str) -> str | None:
        """Returns the ETag of the copy of an object; None if it was not copied."""
        entry = self._entries.get(f"copy {name}")
        return None if entry is None else entry["etag"]

    def add_copied(self, name: str, etag: str) -> None:
        self._add(f"copy {name}", {"etag": etag})

    def packed_from(self) -> str | None:
        """Returns the digest of the objects from which the last packing was finished."""
        return self._entries.get("source", {}).get("digest")

    def add_packed_from(self, digest: str) -> None:
        self._add("source", {"digest": digest})

    def begin_shard(self, name: str) -> None:
        """Records the name of a shard before the shard is published.

        If this process ends in between, the next packing recognizes the shard as its own.
        """
        if name not in self.shards:
            self.shards.add(name)
            self._add(f"name {name}", {})

    def add_shard(self, name: str, entry: dict[str, Any]) -> None:
        self._add(f"shard {name}", entry)

    def compact(self, files: set[str], shards: set[str]) -> None:
        """Keeps only the entries of these files and shards, sorted, so that the same packing gives the same file."""
        wanted = {f"file {file}" for file in files} | {f"shard {shard}" for shard in shards}
        self._replace({key: self._entries[key] for key in sorted(self._entries) if key in wanted})

    def _replace(self, entries: dict[str, dict[str, Any]]) -> None:
        self._entries = entries
        self.close()
        self._stream = self._rewritten()

    def close(self) -> None:
        self._stream.close()

    def _add(self, key: str, entry: dict[str, Any]) -> None:
        self._entries[key] = entry
        self._stream.write(json.dumps([key, entry]) + "\n")
        self._stream.flush()

    def _rewritten(self) -> TextIO:
        """Rewrites the file, without an incomplete last line. Returns it open for appending."""
        lines = [json.dumps(self._header), *(json.dumps([key, entry]) for key, entry in self._entries.items())]
        replace_bytes(self._path, "".join(line + "\n" for line in lines).encode(), durable=True)
        return self._path.open("a", encoding="utf-8")


@contextmanager
def open_progress_log(out: Path, origin: str) -> Iterator[ProgressLog]:
    """Opens the progress log in `out` for packing `origin`, a path without links or an address. Creates `out`, locks
    it and removes partial files.

    Raises: InUseError if another process is packing into `out`; DataError if its content was not packed from `origin`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = {entry.name for entry in out.iterdir()} - {LOCK, _FIRST_PARTIAL}
        if foreign and PROGRESS_FILE not in foreign:
            raise DataError(f"{out} contains {min(foreign)} but no packing log; choose another folder")
        lock = (out / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUseError(f"another process is packing into {out}; wait for it or stop it") from error
        header = {"version": _VERSION, "folder": origin, "decoders": _decoders()}
        with writing(out):
            entries, shards = _entries_of(out / PROGRESS_FILE, header, out)
            for leftover in out.glob(".*.partial"):
                if _PARTIAL.fullmatch(leftover.name) and not leftover.is_dir():
                    leftover.unlink()
            log = ProgressLog(out / PROGRESS_FILE, header, entries, shards)
        try:
            yield log
        finally:
            log.close()


def _decoders() -> dict[str, str]:
    """Returns the versions of the decoders. If one has changed, every file is examined again."""
    return {name: version(name) for name in ("av", "pillow", "simplejpeg")}


def _entries_of(path: Path, header: dict[str, Any], out: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Returns the entries that are still valid, and the names of all shards ever written."""
    if not path.exists():
        return {}, set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = _parsed(lines[0]) if lines else None
    if not isinstance(found, dict) or found.get("folder") != header["folder"]:
        origin = found.get("folder") if isinstance(found, dict) else "an unknown folder"
        raise DataError(f"{out} holds shards packed from {origin}; choose another folder, or remove it first")
    entries = {}
    for line in lines[1:]:
        pair = _parsed(line)
        if isinstance(pair, list) and len(pair) == 2:
            entries[pair[0]] = pair[1]
    shards = {key.partition(" ")[2] for key in entries if key.startswith(("shard ", "name "))}
    if found != header:
        return {f"name {name}": {} for name in sorted(shards)}, shards
    return entries, shards


def _parsed(line: str) -> Any:
    """Returns the JSON value of a line; None for an incomplete last line."""
    try:
        return json.loads(line)
    except ValueError:
        return None
