"""A folder of media files to WebDataset shards and a manifest.

The same folder gives the same bytes, however often packing was interrupted: every decision is a function of the
rows and the files' contents. A shard appears under its name only when it is whole, the manifest only when all are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from tqdm import tqdm

from univitar_ds.data.shards.manifest import MANIFEST, read_manifest
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.writing.build_manifest import build_manifest
from univitar_ds.data.writing.destination import Destination, destination_of
from univitar_ds.data.writing.examine import Job, MediaInfo, examine_all
from univitar_ds.data.writing.progress_log import ProgressLog, open_journal
from univitar_ds.data.writing.source_folder import Row, read_folder
from univitar_ds.errors import DataError, writing

if TYPE_CHECKING:
    from webdataset import TarWriter

__all__ = ["pack_folder", "read_manifest"]

_LAYOUT = 3
"""Of the members of a shard. Another number: what was packed before is packed anew."""
_NOBODYS: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
"""Members of no user, group and time, so that the same samples are the same bytes; uid and gid are 0 anyway."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_FILES_PER_WORKER = 128

Sample = tuple[Row, MediaInfo]


@dataclass(frozen=True)
class _Shard:
    """A shard to be: `first` is the ordinal of its first sample within its split and kind."""

    name: str
    split: str
    kind: str
    first: int
    samples: Sequence[Sample]

    def plan(self) -> str:
        """Fingerprint of everything that its bytes depend on."""
        return _digest([[_LAYOUT, self.first], [[*_identity(row, found)] for row, found in self.samples]])


@dataclass(frozen=True)
class PackOptions:
    """How a folder is packed.

    `shard_mb`: size of a shard in 10^6 bytes; a larger sample gets its own shard. `workers`: processes that examine
    files (None: as many as are useful). `verify`: decode every file once instead of trusting headers. `progress`: show
    bars on stderr. `captions`: whether the .txt of a file holds one caption, or one per line.
    """

    shard_mb: float = 64.0
    workers: int | None = None
    verify: bool = True
    progress: bool = True
    captions: Literal["one", "lines"] = "one"


def pack_folder(
    folder: str | Path,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    settings: StorageSettings = LOCAL,
    state: Path | None = None,
) -> dict[str, Any]:
    """Pack a folder into `out`: {split}-{kind}-{000000}.tar and manifest.json. Can be killed and run again.

    `out` is a local folder or s3://bucket/prefix; there a shard is written locally, uploaded and removed, one after
    another, and what is known so far lies in a local folder. No two machines may pack to one prefix at once.

    A sample is {key}.{ext}, the file as it is, and {key}.json with captions, label, set, kind, width, height, frames,
    duration_s (of a video by its header, 0.0 for an image), file, and crc32 of the file's bytes. Samples lie in an
    order drawn from a hash of their file names, so that every shard is a fair mix.
    Media that cannot be read are left out and listed under `skipped`.

    Args: options (None: the defaults); settings, how S3 is reached; state, the folder for the progress of packings to
        S3 (None: ~/.local/state/univitar_ds/pack).
    Returns: the manifest.
    Raises: DataError for a folder with faulty descriptions or nothing to pack, and for an `out` that is in use
        or not ours.
    """
    folder, options = Path(folder), options or PackOptions()
    if options.shard_mb <= 0:
        raise DataError(f"shards of {options.shard_mb} MB hold nothing; use a size above 0")
    listing = read_folder(folder, options.captions)
    destination = destination_of(out, folder, settings, state)
    workspace = destination.workspace
    if workspace.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{workspace} lies inside {folder}, which is being packed; choose a folder outside of it")
    with writing(workspace), open_journal(workspace, folder) as journal:
        destination.claim()
        found = _examine(folder, listing.rows, journal, options)
        samples = [(row, finding) for row, finding in found if finding.fault is None]
        skipped = [{"file": row.file, "reason": finding.fault} for row, finding in found if finding.fault is not None]
        if not samples:
            raise DataError(
                f"{folder}: none of its {len(skipped)} media files can be read; the first: "
                f"{skipped[0]['file']}: {skipped[0]['reason']}"
            )
        skipped += [{"file": file, "reason": reason} for file, reason in listing.left_out.items()]
        return _write_all(folder, destination, samples, skipped, journal, options)


def _examine(folder: Path, rows: Sequence[Row], journal: ProgressLog, options: PackOptions) -> list[Sample]:
    """Every row with its finding; files that have not changed since an earlier packing are not opened again."""
    verify, workers = options.verify, options.workers or os.cpu_count() or 1
    findings: dict[str, MediaInfo] = {}
    stamps: dict[str, list[int]] = {}
    unknown = []
    for row in rows:
        try:
            state = os.stat(folder / row.file)
        except OSError:  # a link to nothing: examined like the others, which says so, but not remembered
            unknown.append(row)
            continue
        stamps[row.file] = [state.st_size, state.st_mtime_ns]
        known = journal.finding(row, stamps[row.file], verify)
        if known is None:
            unknown.append(row)
        else:
            findings[row.file] = known
    most = len(unknown) // _FILES_PER_WORKER + 1
    jobs = [Job(folder / row.file, row.kind, verify) for row in unknown]
    with tqdm(total=len(rows), initial=len(findings), desc="examine", unit="file", disable=not options.progress) as bar:
        for index, finding in examine_all(jobs, min(workers, most)):
            row = unknown[index]
            if row.file in stamps:
                journal.add_finding(row, stamps[row.file], verify, finding)
            findings[row.file] = finding
            bar.update()
    return [(row, findings[row.file]) for row in rows]


def _planned(samples: Sequence[Sample], shard_mb: float) -> list[_Shard]:
    """Samples of each split and kind in their drawn order, cut into shards by size."""

    def group(sample: Sample) -> tuple[str, str]:
        return sample[0].split, sample[1].kind

    def drawn(sample: Sample) -> bytes:
        return hashlib.blake2b(sample[0].file.encode("utf-8", "surrogateescape")).digest()

    shards = []
    for (split, kind), members in groupby(sorted(samples, key=lambda one: (group(one), drawn(one))), group):
        first = 0
        for number, run in enumerate(_runs(list(members), shard_mb * 1e6)):
            shards.append(_Shard(f"{split}-{kind}-{number:06d}.tar", split, kind, first, run))
            first += len(run)
    return shards


def _runs(samples: Sequence[Sample], most_bytes: float) -> Iterator[list[Sample]]:
    """Consecutive samples of at most so many bytes of media, at least one sample each."""
    run: list[Sample] = []
    room = most_bytes
    for sample in samples:
        if run and sample[1].bytes > room:
            yield run
            run, room = [], most_bytes
        run.append(sample)
        room -= sample[1].bytes
    yield run


def _write_all(
    folder: Path,
    destination: Destination,
    samples: Sequence[Sample],
    skipped: list[dict[str, str]],
    journal: ProgressLog,
    options: PackOptions,
) -> dict[str, Any]:
    """Shards that are not there yet, then the manifest, then nothing that belongs to an earlier packing."""
    shards = _planned(samples, options.shard_mb)
    identities = [[*_identity(row, found)] for row, found in samples]
    fingerprint = _digest([_LAYOUT, options.shard_mb, sorted(identities, key=lambda one: one[0]), skipped])
    names = {shard.name for shard in shards}
    known = journal.shards | destination.shards()
    if destination.fingerprint() != fingerprint:
        destination.remove(MANIFEST)  # from here on it would describe shards that change
    there = destination.names()
    for stale in sorted((there & known) - names):
        destination.remove(stale)
    rows = []
    with tqdm(total=len(samples), desc="write", unit="sample", disable=not options.progress) as bar:
        for shard in shards:
            plan = shard.plan()
            entry = journal.shard(shard.name, plan)
            if entry is None or not destination.holds(shard.name, entry):
                partial = destination.workspace / f".{shard.name}.partial"
                entry = {"plan": plan, **_write_shard(folder, partial, shard)}
                if shard.name in there - known and not destination.holds(shard.name, entry):
                    raise DataError(
                        f"{destination.place} holds {shard.name}, which was not packed there; move it elsewhere"
                    )
                journal.begin_shard(shard.name)
                destination.publish(partial, shard.name, entry)
                journal.add_shard(shard.name, entry)
            rows.append(
                {
                    "file": shard.name,
                    "split": shard.split,
                    "kind": shard.kind,
                    "samples": len(shard.samples),
                    "bytes": entry["bytes"],
                    "sha256": entry["sha256"],
                }
            )
            bar.update(len(shard.samples))
    manifest = build_manifest(samples, rows, skipped, fingerprint)
    destination.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    journal.tidy({row.file for row, _ in samples} | {row["file"] for row in skipped}, names)
    return manifest


def _write_shard(folder: Path, path: Path, shard: _Shard) -> dict[str, Any]:
    """Write one shard. Returns size and hash."""
    from webdataset import TarWriter  # which imports torch: not before there is something to write

    with path.open("wb") as stream:
        hashing = _Hashing(stream)
        with TarWriter(hashing, **_NOBODYS) as tar:
            for ordinal, (row, found) in enumerate(shard.samples, shard.first):
                stem = _UNSAFE.sub("_", PurePosixPath(row.file).stem)[:60]
                key = f"{ordinal:08d}-{stem}"
                content = _unchanged(folder / row.file, found)
                _add(tar, key, found.extension, content)
                _add(tar, key, "json", _described(row, found, zlib.crc32(content)))
    return {"bytes": hashing.size, "sha256": hashing.state.hexdigest()}


class _Hashing:
    """A file that is hashed as it is written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.state, self.size = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.state.update(data)
        self.size += len(data)
        return self._stream.write(data)


def _add(tar: TarWriter, key: str, extension: str, content: bytes) -> None:
    """One member; of several in one call `TarWriter` would put a .json before a .png."""
    tar.write({"__key__": key, extension: content})


def _unchanged(path: Path, found: MediaInfo) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read any more: {error.strerror}; pack again") from error
    if hashlib.sha256(content).hexdigest() != found.sha256:
        raise DataError(f"{path} changed while it was being packed; pack again when nothing writes to the folder")
    return content


def _described(row: Row, found: MediaInfo, crc32: int) -> bytes:
    fields = {
        "captions": row.captions,
        "label": row.label,
        "set": row.set,
        "kind": found.kind,
        "width": found.width,
        "height": found.height,
        "frames": found.frames,
        "duration_s": found.duration_s,
        "file": row.file,
        "crc32": crc32,
    }
    return json.dumps(fields).encode()


def _identity(row: Row, found: MediaInfo) -> Iterator[Any]:
    yield from (row.file, row.split, row.captions, row.label, row.set)
    yield from (found.kind, found.extension, found.sha256, found.height, found.width, found.frames, found.duration_s)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
