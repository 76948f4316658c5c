"""Packs media files of a folder, a table or tars into WebDataset shards and a manifest.

The output depends only on the rows and the contents of the files, and not on interruptions. A shard gets its final name
only when it is complete, and the manifest is written when all shards are complete.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from univitar_ds.data.importing import from_plugins
from univitar_ds.data.importing.recognise import read_source
from univitar_ds.data.importing.rows import Cell, Listing, Part, ReadOptions, Row, check_split
from univitar_ds.data.shards.hold_out import check_splits
from univitar_ds.data.shards.manifest import MANIFEST, read_manifest
from univitar_ds.data.storage.base import LOCAL, S3, StorageSettings
from univitar_ds.data.storage.local import LocalStorage
from univitar_ds.data.writing.build_manifest import build_manifest
from univitar_ds.data.writing.destination import Destination, destination_of, shards_of
from univitar_ds.data.writing.examine import Job, MediaInfo, examine_all
from univitar_ds.data.writing.extract import Extracted, extracted, stamp_of
from univitar_ds.data.writing.held_out import Sample, divided
from univitar_ds.data.writing.progress_log import EXTRACTED, ProgressLog, open_progress_log
from univitar_ds.data.writing.remote_source import RemoteSource, find_source, read_copied, remove_copies
from univitar_ds.errors import DataError, writing
from univitar_ds.extras import extra
from univitar_ds.screen import progress_bar

if TYPE_CHECKING:
    from webdataset import TarWriter

__all__ = ["pack_folder", "read_manifest"]

_LAYOUT = 3
"""Version of the layout of a shard. If it changes, folders are packed again."""
_TAR_FIELDS: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
"""Members have no user, group or time, so that the same samples are the same bytes; uid and gid are always 0."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_FILES_PER_WORKER = 128

Extract = Callable[[Sequence[Row]], Extracted]
"""`extract.extracted` of a source."""


@dataclass(frozen=True)
class _Shard:
    """A planned shard. `first` is the number of its first sample within its split and kind."""

    name: str
    split: str
    kind: str
    first: int
    samples: Sequence[Sample]

    def plan(self) -> str:
        """Returns a hash of everything that the bytes of the shard depend on."""
        return _digest([[_LAYOUT, self.first], [[*_identity(row, found)] for row, found in self.samples]])


@dataclass(frozen=True)
class PackOptions:
    """Options for packing a source.

    `shard_mb`: size of a shard in 10^6 bytes; a larger sample gets its own shard. `workers`: processes that examine
    files (None: as many as are useful). `verify`: decode every file once, instead of reading only headers. `progress`:
    show bars on stderr. `reading`: the format of the source, and how its texts are found. `hold_out`: share of the
    samples of a source without splits that get the split `test`; None: none.
    """

    shard_mb: float = 64.0
    workers: int | None = None
    verify: bool = True
    progress: bool = True
    reading: ReadOptions = field(default_factory=ReadOptions)
    hold_out: float | None = None


def pack_folder(
    folder: str | Path,
    out: str | Path,
    options: PackOptions | None = None,
    *,
    settings: StorageSettings = LOCAL,
    state: Path | None = None,
    listing: Listing | None = None,
) -> dict[str, Any]:
    """Packs a source into `out`: {split}-{kind}-{000000}.tar and manifest.json. Can be interrupted and run again.

    `folder` is a folder, a table, a JSON of COCO, a tar or a brace range of tars; see `importing.recognise.FORMATS`. On
    S3, at s3://bucket/prefix, its objects are copied to the workspace first.

    `out` is a local folder or s3://bucket/prefix. For S3, each shard is written locally, uploaded and removed before
    the next one, and the progress log is in a local folder. Two machines must not pack to the same prefix at once.

    A sample is {key}.{ext}, the unchanged file, and {key}.json with captions, label, set, kind, width, height, frames,
    duration_s (of a video from its header, 0.0 for an image), file, and crc32 of the file's bytes. Samples are sorted
    by a hash of their file names, so that every shard is a representative mix.
    Media that cannot be read are left out and listed under `skipped`.

    Args: options: None: the defaults; settings: for access to S3; state: the folder for the progress logs of packing to
        S3, None: ~/.local/state/univitar_ds/pack; listing: of `folder`, if the caller has read it already.
    Returns: the manifest.
    Raises: DataError for a source with faulty rows or nothing to pack, and for an `out` that is in use or has other
        content.
    """
    options = options or PackOptions()
    if not 0 < options.shard_mb < math.inf:
        raise DataError(f"--shard-mb {options.shard_mb}: shards need a finite size above 0, in 10^6 bytes")
    if options.hold_out is not None and not 0 < options.hold_out < 1:
        raise DataError(f"--hold-out {options.hold_out}: give a share of the samples above 0 and below 1, such as 0.05")
    remote = None
    if listing is None and str(folder).startswith(S3) and not from_plugins.reads(str(folder)):
        check_split(options.reading.split)
        remote = find_source(str(folder), settings)
    else:
        listing = listing or read_source(folder, options.reading)
    origin = str(Path(folder).resolve()) if remote is None else remote.url
    destination = destination_of(out, origin, settings, state)
    _check_apart(destination, origin)
    workspace = destination.workspace
    with writing(workspace), open_progress_log(workspace, origin) as progress_log:
        destination.claim()
        if remote is not None:
            return _pack_remote(remote, destination, progress_log, options)
        assert listing is not None
        return _pack(str(folder), listing, destination, progress_log, options)


def _check_apart(destination: Destination, origin: str) -> None:
    """Raises DataError if the destination is inside the folder that is packed."""
    place = destination.place if origin.startswith(S3) else str(destination.workspace.resolve())
    if (place == origin and not os.path.isfile(place)) or place.startswith(f"{origin.rstrip('/')}/"):
        raise DataError(f"{place} is inside {origin}, which is being packed; choose a folder outside of it")


def _pack_remote(
    remote: RemoteSource, destination: Destination, progress_log: ProgressLog, options: PackOptions
) -> dict[str, Any]:
    """Packs a source on S3 from a copy, unless its objects are those of the last packing."""
    digest = remote.digest(replace(options, workers=None, progress=False))
    manifest = destination.manifest()
    shards = manifest.get("shards", [])
    if progress_log.packed_from() == digest and shards and all(destination.holds(row["file"], row) for row in shards):
        return manifest
    remote, listing = read_copied(remote, destination.workspace, progress_log, options.reading, options.progress)
    manifest = _pack(remote.url, listing, destination, progress_log, options)
    remove_copies(remote, destination.workspace)
    if remote.is_fixed(options.reading):
        progress_log.add_packed_from(digest)
    return manifest


def _pack(
    folder: str, listing: Listing, destination: Destination, progress_log: ProgressLog, options: PackOptions
) -> dict[str, Any]:
    """Examines the media of a listing, and writes the shards and the manifest. `folder`: the source, for messages."""
    if options.hold_out is not None:
        check_splits(folder, {row.split for row in listing.rows})
    workspace = destination.workspace
    extract = partial(extracted, listing.root, workspace, progress_log, options.progress)
    found = _examine(listing, progress_log, extract, options)
    samples = [(row, info) for row, info in found if info.fault is None]
    skipped = [{"file": row.file, "reason": info.fault} for row, info in found if info.fault is not None]
    if not samples:
        raise DataError(
            f"{folder}: none of its {len(skipped)} media files can be read; the first: "
            f"{skipped[0]['file']}: {skipped[0]['reason']}"
        )
    if options.hold_out is not None:
        samples = divided(samples, options.hold_out)
    skipped += [{"file": file, "reason": reason} for file, reason in listing.left_out.items()]
    manifest = _write_all(listing.root, destination, samples, skipped, (progress_log, extract), options)
    if any(isinstance(row.part, Cell) for row in listing.rows):
        (workspace / EXTRACTED).unlink(missing_ok=True)
    return manifest


def _examine(listing: Listing, progress_log: ProgressLog, extract: Extract, options: PackOptions) -> list[Sample]:
    """Returns every row with its result. Files that have not changed since an earlier packing are not opened again."""
    verify, workers = options.verify, options.workers or os.cpu_count() or 1
    folder, rows = listing.root, listing.rows
    infos: dict[str, MediaInfo] = {}
    stamps: dict[str, list[int]] = {}
    unknown = []
    for row in rows:
        try:
            stamps[row.file] = stamp_of(folder, row)
        except OSError:  # a broken link: `examine_all` reports it, but it is not logged
            unknown.append(row)
            continue
        known = progress_log.info(row, stamps[row.file], verify)
        if known is None:
            unknown.append(row)
        else:
            infos[row.file] = known
    parts, faults, passing = extract(unknown)
    for row in unknown:
        if row.file in faults:
            infos[row.file] = MediaInfo(faults[row.file])
            if row.file not in passing:
                progress_log.add_info(row, stamps[row.file], verify, infos[row.file])
    unknown = [row for row in unknown if row.file not in faults]
    most = len(unknown) // _FILES_PER_WORKER + 1
    jobs = [Job(folder / row.file, row.kind, verify, parts.get(row.file, row.part)) for row in unknown]
    with progress_bar(
        total=len(rows), initial=len(infos), desc="examine", unit="file", disable=not options.progress
    ) as bar:
        for index, info in examine_all(jobs, min(workers, most)):
            row = unknown[index]
            if row.file in stamps and info.repeatable and row.file not in passing:
                progress_log.add_info(row, stamps[row.file], verify, info)
            infos[row.file] = info
            bar.update()
    return [(row, infos[row.file]) for row in rows]


def _planned(samples: Sequence[Sample], shard_mb: float) -> list[_Shard]:
    """Returns the shards: samples of each split and kind in the order of their hashes, divided by size."""

    def group(sample: Sample) -> tuple[str, str]:
        return sample[0].split, sample[1].kind

    def hashed(sample: Sample) -> bytes:
        return hashlib.blake2b(sample[0].file.encode("utf-8", "surrogateescape")).digest()

    shards = []
    for (split, kind), members in groupby(sorted(samples, key=lambda one: (group(one), hashed(one))), group):
        first = 0
        for number, run in enumerate(_runs(list(members), shard_mb * 1e6)):
            shards.append(_Shard(f"{split}-{kind}-{number:06d}.tar", split, kind, first, run))
            first += len(run)
    return shards


def _runs(samples: Sequence[Sample], most_bytes: float) -> Iterator[list[Sample]]:
    """Yields runs of consecutive samples with at most this many bytes of media, at least one sample each."""
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
    work: tuple[ProgressLog, Extract],
    options: PackOptions,
) -> dict[str, Any]:
    """Removes the shards of an earlier packing, and writes missing shards and then the manifest."""
    progress_log, extract = work
    shards = _planned(samples, options.shard_mb)
    identities = [[*_identity(row, found)] for row, found in samples]
    fingerprint = _digest([_LAYOUT, options.shard_mb, sorted(identities, key=lambda one: one[0]), skipped])
    names = {shard.name for shard in shards}
    earlier = destination.manifest()
    known = progress_log.shards | shards_of(earlier)
    if earlier.get("fingerprint") != fingerprint:
        destination.remove(MANIFEST)  # it would describe shards that change now
    there = destination.names()
    for stale in sorted((there & known) - names):
        destination.remove(stale)
    entries = {shard.name: _written(destination, progress_log, shard) for shard in shards}
    missing = [row for shard in shards if entries[shard.name] is None for row, _ in shard.samples]
    parts = extract(missing).parts
    rows = []
    with progress_bar(total=len(samples), desc="write", unit="sample", disable=not options.progress) as bar:
        for shard in shards:
            entry = entries[shard.name]
            if entry is None:
                unfinished = destination.workspace / f".{shard.name}.partial"
                entry = {"plan": shard.plan(), **_write_shard(folder, unfinished, shard, parts)}
                if shard.name in there - known and not destination.holds(shard.name, entry):
                    raise DataError(
                        f"{destination.place} holds {shard.name}, which was not packed there; move it elsewhere"
                    )
                progress_log.begin_shard(shard.name)
                destination.publish(unfinished, shard.name, entry)
                progress_log.add_shard(shard.name, entry)
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
    progress_log.compact({row.file for row, _ in samples} | {row["file"] for row in skipped}, names)
    return manifest


def _written(destination: Destination, progress_log: ProgressLog, shard: _Shard) -> dict[str, Any] | None:
    """Returns the entry of a shard that is at the destination already; None if it must be written."""
    entry = progress_log.shard(shard.name, shard.plan())
    return entry if entry is not None and destination.holds(shard.name, entry) else None


def _write_shard(folder: Path, path: Path, shard: _Shard, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Writes one shard. Returns its size and hash. `parts`: the extracted media of tables by the file of their row."""
    with extra("webdataset"):
        from webdataset import TarWriter  # imports torch, so only if there is a shard to write

    with path.open("wb") as stream:
        hashing = _Hashing(stream)
        with TarWriter(hashing, **_TAR_FIELDS) as tar:
            for ordinal, (row, found) in enumerate(shard.samples, shard.first):
                stem = _UNSAFE.sub("_", PurePosixPath(row.file).stem)[:60]
                key = f"{ordinal:08d}-{stem}"
                content = _unchanged(folder / row.file, parts.get(row.file, row.part), found)
                _add(tar, key, found.extension, content)
                _add(tar, key, "json", _described(row, found, zlib.crc32(content)))
    return {"bytes": hashing.size, "sha256": hashing.state.hexdigest()}


class _Hashing:
    """A file that hashes the bytes written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.state, self.size = stream, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.state.update(data)
        self.size += len(data)
        return self._stream.write(data)


def _add(tar: TarWriter, key: str, extension: str, content: bytes) -> None:
    """Writes one member. With several members in one call, `TarWriter` would write a .json before a .png."""
    tar.write({"__key__": key, extension: content})


def _unchanged(path: Path, part: Part | Cell | None, found: MediaInfo) -> bytes:
    if isinstance(part, Cell):
        raise DataError(f"{path} can no longer be read in its table; pack again when nothing writes to the table")
    try:
        content = path.read_bytes() if part is None else LocalStorage().read_range(*part)
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
