"""The memory of a packing that may be killed at any moment: a line for each file seen and each shard written.

It stays beside the shards, so that packing again looks only at files that have changed since.
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
from univitar_ds.data.shards.manifest import JOURNAL
from univitar_ds.data.writing.examine import MediaInfo
from univitar_ds.data.writing.source_folder import Row
from univitar_ds.errors import DataError, writing

LOCK = ".pack.lock"
SHARD_NAME = re.compile(r".+-(image|video)-\d{6}\.tar")
_PARTIAL = re.compile(rf"\.({SHARD_NAME.pattern}|manifest\.json|pack\.jsonl)\.partial")
_VERSION = 2
"""Of the findings. Another number: every file is examined again."""


class ProgressLog:
    """Findings and shards of one output folder. Open with `open_journal`."""

    def __init__(
        self, path: Path, header: dict[str, Any], entries: dict[str, dict[str, Any]], shards: set[str] | None = None
    ) -> None:
        self._path, self._header, self._entries = path, header, entries
        self.shards = shards or set()
        """Names of all shards that were written here or begun, also by another version of the decoders."""
        self._stream: TextIO = self._rewritten()

    def finding(self, row: Row, stamp: list[int], verify: bool) -> MediaInfo | None:
        """What was found in a file that still has this stamp (size, modification time)."""
        entry = self._entries.get(f"file {row.file}")
        if entry is None or [entry["stamp"], entry["kind"], entry["verify"]] != [stamp, row.kind, verify]:
            return None
        return MediaInfo(**entry["finding"])

    def add_finding(self, row: Row, stamp: list[int], verify: bool, finding: MediaInfo) -> None:
        self._add(f"file {row.file}", {"stamp": stamp, "kind": row.kind, "verify": verify, "finding": asdict(finding)})

    def shard(self, name: str, plan: str) -> dict[str, Any] | None:
        """Size and hash of a shard that was written to this plan."""
        entry = self._entries.get(f"shard {name}")
        return entry if entry is not None and entry["plan"] == plan else None

    def begin_shard(self, name: str) -> None:
        """Before a shard gets its name: from here on it is ours, whenever the process ends."""
        if name not in self.shards:
            self.shards.add(name)
            self._add(f"name {name}", {})

    def add_shard(self, name: str, entry: dict[str, Any]) -> None:
        self._add(f"shard {name}", entry)

    def tidy(self, files: set[str], shards: set[str]) -> None:
        """Forget everything else, and put the rest in order: the same packing leaves the same journal."""
        wanted = {f"file {file}" for file in files} | {f"shard {shard}" for shard in shards}
        self._entries = {key: self._entries[key] for key in sorted(self._entries) if key in wanted}
        self.close()
        self._stream = self._rewritten()

    def close(self) -> None:
        self._stream.close()

    def _add(self, key: str, entry: dict[str, Any]) -> None:
        self._entries[key] = entry
        self._stream.write(json.dumps([key, entry]) + "\n")
        self._stream.flush()

    def _rewritten(self) -> TextIO:
        """The journal written anew, without a torn last line, and open at its end."""
        lines = [json.dumps(self._header), *(json.dumps([key, entry]) for key, entry in self._entries.items())]
        replace_bytes(self._path, "".join(line + "\n" for line in lines).encode(), durable=True)
        return self._path.open("a", encoding="utf-8")


@contextmanager
def open_journal(out: Path, folder: Path) -> Iterator[ProgressLog]:
    """Take `out` for a packing of `folder`: made if missing, locked against others, leftovers removed.

    Raises: DataError if somebody else is packing there, or what is there was not packed from this folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = {entry.name for entry in out.iterdir()} - {LOCK}
        if foreign and JOURNAL not in foreign:
            raise DataError(f"{out} is not empty and was not packed here ({min(foreign)}); choose another folder")
        lock = (out / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out} is being packed by another process; wait for it or stop it") from error
        header = {"version": _VERSION, "folder": str(folder.resolve()), "decoders": _decoders()}
        with writing(out):
            entries, shards = _entries_of(out / JOURNAL, header, out)
            for leftover in out.glob(".*.partial"):
                if _PARTIAL.fullmatch(leftover.name) and not leftover.is_dir():
                    leftover.unlink()
            journal = ProgressLog(out / JOURNAL, header, entries, shards)
        try:
            yield journal
        finally:
            journal.close()


def _decoders() -> dict[str, str]:
    """Findings hold for these versions: another one may read more, or less."""
    return {name: version(name) for name in ("av", "pillow", "simplejpeg")}


def _entries_of(path: Path, header: dict[str, Any], out: Path) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """What is known still, and the names of all shards ever written."""
    if not path.exists():
        return {}, set()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = _parsed(lines[0]) if lines else None
    if not isinstance(found, dict) or found.get("folder") != header["folder"]:
        origin = found.get("folder") if isinstance(found, dict) else "an unknown folder"
        raise DataError(f"{out} holds what was packed from {origin}; choose another folder, or remove it first")
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
    """A line's JSON; None for the torn last line of a killed packing."""
    try:
        return json.loads(line)
    except ValueError:
        return None
