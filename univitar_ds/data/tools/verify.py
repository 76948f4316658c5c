"""Checks every shard and every sample of the sources before a run, and reports all faults."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.decoding.task_pool import Done, Lost, Next, Task, TaskPool
from univitar_ds.data.shards.line_watch import several_lines_warning
from univitar_ds.data.shards.listing import Shard, expand_braces, place_of
from univitar_ds.data.shards.manifest import MANIFEST, read_manifest
from univitar_ds.data.shards.sources import SourceShard, find_shards, of_source
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.tools.shard_check import (
    DEFAULTS,
    Bad,
    Event,
    Hashed,
    IgnoredText,
    Read,
    Scattered,
    SeveralLines,
    ShardCheck,
    StartPosition,
    UnreadMembers,
    check_shard,
)
from univitar_ds.errors import DataError
from univitar_ds.screen import progress_bar

VERSION = 1
_MOST_EXTENSIONS, _LONGEST_EXTENSION = 50, 40
"""Maximum number of extensions of a shard that are counted by name, and maximum length of their names. There may be one
per file, since the extension starts at the first dot: that of a.001.npy is 001.npy."""
_MOSTLY = 0.9
"""If at least this share of a source's good samples have a .txt with several lines, a warning is reported."""


@dataclass
class _Found:
    """The results for a shard so far. `expected` is its number of samples in the manifest; None: not in a manifest."""

    shard: SourceShard
    expected: int | None
    samples: int = 0
    faults: list[Bad] = field(default_factory=list)
    ignored: list[IgnoredText] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    several_lines: int = 0
    scattered: Scattered | None = None
    sha256: str | None = None
    error: str | None = None

    def add(self, event: Event | Lost | Done) -> None:
        if isinstance(event, Next):
            self.samples += 1
        elif isinstance(event, Lost):
            self.faults.append(Bad(event.kind, *event.item, event.detail))
        elif isinstance(event, Bad):
            self.faults.append(event)
        elif isinstance(event, IgnoredText):
            self.ignored.append(event)
        elif isinstance(event, UnreadMembers):
            for extension in event.extensions:
                name = f".{extension[:_LONGEST_EXTENSION]}" if extension else "without an extension"
                known = name in self.unread or len(self.unread) < _MOST_EXTENSIONS
                self.unread[name if known else "others"] += 1
        elif isinstance(event, SeveralLines):
            self.several_lines += 1
        elif isinstance(event, Scattered):
            self.scattered = event
        elif isinstance(event, Hashed):
            self.sha256 = event.sha256
        elif isinstance(event, Done):
            self.error = event.error

    def to_json(self) -> dict[str, Any]:
        shard = self.shard
        return {
            "shard": shard.name,
            "path": shard.path,
            "bytes": shard.size,
            "error": self.error,
            "sha256": _compared(self.sha256, shard.sha256),
            "samples": self.samples,
            "samples_in_manifest": self.expected,
            "bad": _by_kind(self.faults),
            "faults": list(map(_located, self.faults)),
            "ignored": list(map(_located, self.ignored)),
            "unread": dict(sorted(self.unread.items())),
            "scattered": None if self.scattered is None else self.scattered._asdict(),
        }


def verify(
    sources: Sequence[SourceConfig],
    settings: StorageSettings = LOCAL,
    *,
    workers: int = 1,
    decode: bool = True,
    progress: bool = True,
    limits: DataConfig | None = None,
) -> dict[str, Any]:
    """Checks every shard of the sources in `workers` processes.

    If data are missing or damaged, the rest is still checked. A sample that crashes its process or makes it hang is a
    bad sample of kind "crash" or "timeout". The report depends only on the data, `decode` and `limits`.

    Args: decode: whether to decode every sample, or to check only headers and checksums. progress: whether to show a
        bar on stderr. limits: the data section of a run file, which has the limits of a sample (None: the defaults).
    Returns: {"version", "decoded", "sound", "samples", "bad": {kind: n}, "ignored": {kind: n}, "unread": {".npy": n},
        "sources", "shards"}. A source has path, split, shards (their number), missing (shards that its path or manifest
        names and that do not exist), error and warning. For a shard, see `_Found.to_json`. Each fault, and each ignored
        text of a sample that can be used, has a kind, key ("" for bytes without samples), byte and message. "scattered"
        is the first sample whose members are not consecutive. "sha256" is "matches" or "differs"; None if no manifest
        has a hash, or if the shard was not hashed to its end. "unread" counts the members that the loader does not
        read, by extension.
    """
    settings, limits = settings.shared(), limits or DEFAULTS
    listed: list[dict[str, Any]] = []
    found: list[_Found] = []
    by_source: list[list[_Found]] = []
    for position, source in enumerate(sources):
        about, shards = _find(source, settings)
        prefix = f"{position}:" if len(sources) > 1 else ""
        by_source.append([replace(one, shard=replace(one.shard, name=prefix + one.shard.name)) for one in shards])
        found += by_source[-1]
        listed.append(about)
    start = StartPosition()
    tasks = [
        Task(number, ShardCheck(replace(one.shard, storage=None), settings, decode, limits, confined=True), start)
        for number, one in enumerate(found)
    ]
    total = sum(one.shard.size * (1 if one.shard.sha256 is None else 2) for one in found)
    silence_s = settings.give_up_s + 2 * limits.decode_timeout_s
    with (
        progress_bar(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress) as bar,
        TaskPool(check_shard, min(workers, max(len(tasks), 1)), silence_s) as pool,
    ):
        for number, event in pool.run(tasks):
            if isinstance(event, Read):
                bar.update(event.bytes)
            found[number].add(event)
    for about, own in zip(listed, by_source, strict=True):
        if own and not about["error"] and not any(one.samples or one.faults or one.error for one in own):
            about["error"] = f"source {about['path']}: no sample in its {len(own)} shards; pack it again"
    for about, source, own in zip(listed, sources, by_source, strict=True):
        several = sum(one.several_lines for one in own)
        if several and several >= _MOSTLY * sum(one.samples - len(one.faults) for one in own):
            about["warning"] = several_lines_warning(source)
    return _report(listed, [one.to_json() for one in found], decode)


def _report(sources: list[dict[str, Any]], shards: list[dict[str, Any]], decode: bool) -> dict[str, Any]:
    bad, ignored, unread = Counter[str](), Counter[str](), Counter[str]()
    for shard in shards:
        bad.update(shard["bad"])
        ignored.update(one["kind"] for one in shard["ignored"])
        unread.update(shard["unread"])
    return {
        "version": VERSION,
        "decoded": decode,
        "sound": not any(source["error"] for source in sources) and all(map(_is_sound, shards)),
        "samples": sum(shard["samples"] for shard in shards),
        "bad": dict(sorted(bad.items())),
        "ignored": dict(sorted(ignored.items())),
        "unread": dict(sorted(unread.items())),
        "sources": sources,
        "shards": shards,
    }


def _is_sound(shard: dict[str, Any]) -> bool:
    whole = shard["samples_in_manifest"] in (None, shard["samples"])
    return whole and not shard["faults"] and shard["error"] is None and shard["sha256"] in (None, "matches")


def _compared(found: str | None, expected: str | None) -> str | None:
    if found is None or expected is None:
        return None
    return "matches" if found == expected else "differs"


def _located(found: Bad | IgnoredText) -> dict[str, Any]:
    return {"kind": found.kind, "key": found.key, "byte": found.offset, "message": found.message}


def _by_kind(faults: Sequence[Bad]) -> dict[str, int]:
    return dict(sorted(Counter(fault.kind for fault in faults).items()))


def _find(source: SourceConfig, settings: StorageSettings) -> tuple[dict[str, Any], list[_Found]]:
    """Returns the source's entry in the report, and its existing shards. A run would fail with the entry's error."""
    about: dict[str, Any] = {"path": source.path, "split": source.split, "missing": [], "error": None, "warning": None}
    rows: dict[str, dict[str, Any]] = {}
    shards: Sequence[SourceShard] = []
    try:
        rows = _manifest_rows(source, settings)
        shards = find_shards([source], settings)
    except DataError as error:
        about["error"] = str(error)
        shards, about["missing"] = _existing_shards(source, rows, settings)
    found = []
    for shard in shards:
        row = rows.get(os.path.basename(shard.path))
        found.append(_Found(shard, None if row is None else row["samples"]))
    return {**about, "shards": len(found)}, found


def _manifest_rows(source: SourceConfig, settings: StorageSettings) -> dict[str, dict[str, Any]]:
    """Returns the manifest's rows of the shards of the source's split, by file name; {} if there is no manifest.

    A source without a split, or with held-out samples, has the shards of all splits.
    """
    folder = place_of(source)
    storage = storage_for(folder, settings)
    if folder.endswith(".tar") or not storage.exists(os.path.join(folder, MANIFEST)):
        return {}
    rows = read_manifest(folder, storage)["shards"]
    whole = source.hold_out is not None or source.split is None
    return {row["file"]: row for row in rows if whole or row["split"] == source.split}


def _existing_shards(
    source: SourceConfig, rows: dict[str, dict[str, Any]], settings: StorageSettings
) -> tuple[list[SourceShard], list[str]]:
    """Returns the existing shards of an incomplete source, and the names of the missing ones."""
    try:
        path = place_of(source)
        storage = storage_for(path, settings)
        if path.endswith(".tar"):
            wanted = expand_braces(path)
        elif rows:
            wanted = [os.path.join(path, name) for name in rows]
        else:
            wanted = [file for file in storage.list(path) if file.endswith(".tar")]
        present = [file for file in wanted if storage.exists(file)]
    except DataError:  # already reported as the error of the source
        return [], []
    sizes: dict[str, int] = {}
    for file in present:
        with suppress(DataError):  # a pipe or a device is not a shard
            sizes[file] = storage.size(file)
    shards = []
    for file, size in sizes.items():
        row = rows.get(os.path.basename(file), {})
        name = os.path.basename(file).removesuffix(".tar")
        shards.append(Shard(name, file, storage, size, row.get("kind"), row.get("sha256")))
    try:
        detail = of_source(shards, source, settings)
    except DataError:  # already reported as the error of the source
        detail = of_source(shards, source.model_copy(update={"class_names": None}), settings)
    return detail, [os.path.basename(file) for file in wanted if file not in sizes]
