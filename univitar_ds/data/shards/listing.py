"""Lists the shards of a source: a packed folder, a folder of tars, one tar or a brace range of tars; local or on S3."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.hold_out import HELD_OUT, REST, HoldOut, check_splits
from univitar_ds.data.shards.manifest import MANIFEST, PROGRESS_FILE, read_manifest
from univitar_ds.data.storage.address import check_address, storage_for
from univitar_ds.data.storage.base import LOCAL, S3, Storage, StorageSettings
from univitar_ds.errors import DataError
from univitar_ds.expressions import Condition
from univitar_ds.geometry import Modality

_log = logging.getLogger(__name__)

_BRACES = re.compile(r"\{([^{}]*)\}")
_ODD_TAR = re.compile(r"\.tar(\.(part|partial|tmp|incomplete|crdownload|filepart))?$", re.IGNORECASE)
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MAX_SHARDS = 1_000_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".tar.lz4")
_DECOMPRESS = "samples are read from the middle of shards: decompress first"
PACKED_SOURCES = "packed-sources"
"""Folder with the packed sources of runs; see `data.writing.packed_sources`."""
INIT_HINT = "`univitar-ds init SOURCE` prints a run file that fits the data"
OR_REMOVE = f", or remove the source; {INIT_HINT}"
"""The end of a message about a source of a run file. Commands without one leave it out."""
PACK_HINT = "pack the folder first: univitar-ds data pack FOLDER OUT"


@dataclass(frozen=True)
class Shard:
    """A tar of samples. `name` is unique within the run and identifies the shard in keys and messages; `size`: bytes.

    `modality` is None if unknown: then streams of both modalities read the shard and skip samples of the other one.
    `samples` and `sha256` come from a manifest, for the whole shard. `caption_lines`: whether each line of a .txt is a
    caption. `where`: the condition on the samples that are read; `hold_out`: the part that is read, None: all samples.
    """

    name: str
    path: str
    storage: Storage
    size: int
    modality: Modality | None = None
    sha256: str | None = None
    samples: int | None = None
    caption_lines: bool = False
    where: Condition | None = None
    hold_out: HoldOut | None = None

    @property
    def expected(self) -> int | None:
        """The number of samples that are read, about that if some are held out; None if it is unknown."""
        known = self.samples is not None and self.hold_out is not None
        return self.hold_out.expected(self.samples) if known else self.samples


def list_shards(source: SourceConfig, prefix: str, settings: StorageSettings = LOCAL) -> list[Shard]:
    """Returns the shards in the order of the manifest or of their names; `prefix` is prepended to every name.

    Names and sizes come from folder listings, so that thousands of shards need few requests.
    Raises: DataError if the source or its split does not exist, or a shard is missing or truncated.
    """
    path = place_of(source)
    storage = storage_for(path, settings)
    if path.endswith(COMPRESSED):
        raise DataError(f"source {source.path}: is a compressed tar; {_DECOMPRESS}")
    if path.endswith(".tar"):
        _check_hold_out(source)
        return _listed(expand_braces(path), storage, prefix, source.path)
    if _BRACES.search(path):
        raise DataError(f"source {source.path}: a brace range must name tars, e.g. train-{{000000..000127}}.tar")
    if not storage.exists(path):
        remedy = "check the path"
        if PACKED_SOURCES in os.path.normpath(path).split("/"):
            remedy = "it was packed there from another source; name that again, with its table and class_names: "
            remedy += "data.sources.N.path=ORIGINAL"
        raise DataError(f"source {source.path}: there is no such file or folder; {remedy}")
    if os.path.isfile(path):
        raise DataError(f"source {source.path}: is neither a folder nor a .tar file; {PACK_HINT}")
    files = storage.list(path)
    names = set(map(os.path.basename, files))
    _warn_left_out(source, names)
    if names & {MANIFEST, PROGRESS_FILE}:
        return _packed(source, path, names, storage, prefix)
    tars = [file for file in files if file.endswith(".tar")]
    if compressed := [os.path.basename(file) for file in files if file.endswith(COMPRESSED)]:
        detail = f"source {source.path}: {len(compressed)} tars are compressed, such as {compressed[0]}; {_DECOMPRESS}"
        if not tars:
            raise DataError(detail)
        warn_once(f"{detail}; they are left out")
    _check_hold_out(source)
    names_of = _names(tars)
    return [Shard(prefix + names_of[file], file, storage, storage.size(file)) for file in tars]


def _check_hold_out(source: SourceConfig, splits: Iterable[str] = (REST,)) -> None:
    if source.hold_out is not None:
        check_splits(f"source {source.path}", set(splits), source.split)


def _warn_left_out(source: SourceConfig, names: Iterable[str]) -> None:
    """Warns of files such as `.tar.part` or `.TAR`, which interrupted copies or other systems may have written."""
    odd = sorted(name for name in names if _ODD_TAR.search(name) and not name.endswith(".tar"))
    if odd:
        warn_once(f"source {source.path}: {odd[0]} ({len(odd)} in all) do not end in .tar and are left out")


@cache
def warn_once(message: str) -> None:
    """Logs a warning once per process: a source is listed before training, by every stage and for the tokenizer."""
    _log.warning("%s", message)


def place_of(source: SourceConfig) -> str:
    """Returns the path of a source's folder or tars; for a manifest, that of its folder.

    Raises: DataError for an unsupported scheme or an s3:// address without a bucket."""
    path = source.path.removesuffix(f"/{MANIFEST}")
    check_address(path)
    if path.startswith(S3) and path[len(S3) : len(S3) + 1] in ("", "/"):
        raise DataError(f"source {source.path}: names no bucket; write s3://BUCKET/PREFIX")
    return re.sub(r"(?<=[^/:])//+$", "/", path)


def expand_braces(pattern: str) -> list[str]:
    """Expands ranges (`a-{000..002}.tar`, with leading zeros) and lists (`{x,y}`); other names are returned unchanged.

    `braceexpand`, which webdataset uses, creates all names first: `{0..99999999999}` filled 4 GB in 20 s and ended in a
    MemoryError. It also expands `{5..1}` in descending order, does not reject `{x}`, and drops backslashes.

    Raises: DataError for other braces, a descending range, or more than a million names.
    """
    pieces: list[list[str]] = []
    last = 0
    for match in _BRACES.finditer(pattern):
        pieces += [[pattern[last : match.start()]], _alternatives(match.group(1), pattern)]
        last = match.end()
    pieces.append([pattern[last:]])
    total = 1
    for piece in pieces:
        total *= len(piece)
    if total > _MAX_SHARDS:
        raise DataError(f"source {pattern}: expands to {total} shards (limit {_MAX_SHARDS}); narrow the range")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _alternatives(text: str, pattern: str) -> list[str]:
    match = _RANGE.match(text)
    if not match and "," not in text:
        raise DataError(
            f"source {pattern}: {{{text}}} is neither a range nor a list; write {{000..127}} for a range of whole "
            "numbers, {a,b} for a list"
        )
    if not match:
        return text.split(",")
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"source {pattern}: the range {{{text}}} runs backwards; write {{{last}..{first}}}")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    if int(last) - int(first) >= _MAX_SHARDS:
        raise DataError(f"source {pattern}: {{{text}}} is more than {_MAX_SHARDS} shards; narrow the range")
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _listed(paths: Sequence[str], storage: Storage, prefix: str, source: str) -> list[Shard]:
    if len(paths) == 1:  # without listing the folder, which may have a million files
        missing = [path for path in paths if not storage.exists(path)]
    else:
        folders = {os.path.dirname(path) for path in paths}
        present = {folder: _names_in(folder or ".", storage) for folder in sorted(folders)}
        missing = [path for path in paths if os.path.basename(path) not in present[os.path.dirname(path)]]
    if missing and (pattern := re.search(r"[*?\[]", missing[0])):
        raise DataError(
            f"source {source}: {pattern[0]} cannot be used as a pattern; name the folder, or a range {{000..127}}.tar"
        )
    if missing:
        raise DataError(
            f"source {source}: shard {missing[0]} is missing ({len(missing)} of {len(paths)} are); "
            "restore it or correct the source"
        )
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"source {source}: names shard {twice} more than once; name each shard once")
    names_of = _names(paths)
    return [Shard(prefix + names_of[path], path, storage, storage.size(path)) for path in paths]


def _names_in(folder: str, storage: Storage) -> set[str]:
    return set(map(os.path.basename, storage.list(folder))) if storage.exists(folder) else set()


def _packed(source: SourceConfig, folder: str, names: set[str], storage: Storage, prefix: str) -> list[Shard]:
    manifest = read_manifest(folder, storage)
    present = sorted({row["split"] for row in manifest["shards"]})
    _check_hold_out(source, present)
    wanted = [*present] if source.hold_out is not None or source.split is None else [source.split]
    rows = [row for row in manifest["shards"] if row["split"] in wanted]
    if others := sorted({n for n in names if n.endswith(".tar")} - {row["file"] for row in manifest["shards"]}):
        warn_once(
            f"source {source.path}: its manifest does not list {others[0]} ({len(others)} in all), which are left out"
        )
    if not rows:
        raise no_split(source, present)
    shards = []
    for row in rows:
        path = os.path.join(folder, row["file"])
        if row["file"] not in names:
            raise DataError(
                f"source {source.path}: shard {row['file']} of its manifest is missing; restore it or pack again"
            )
        size = storage.size(path)
        if size != row["bytes"]:
            raise DataError(
                f"shard {path}: has {size} bytes, its manifest says {row['bytes']}; "
                "it was truncated or replaced: restore it or pack the folder again"
            )
        shards.append(Shard(prefix + _stem(path), path, storage, size, row["kind"], row.get("sha256"), row["samples"]))
    return shards


def no_split(source: SourceConfig, present: Sequence[str]) -> DataError:
    """Returns the error for a source without its split. Args: present: the splits that it has."""
    divide = "" if source.split != HELD_OUT or len(present) != 1 else ", divide it by hold_out in both sections"
    return DataError(
        f"source {source.path}: has no split {source.split!r}; it has {', '.join(present) or 'no shard at all'}; "
        f"name one of these{divide}{OR_REMOVE}"
    )


def _names(paths: Sequence[str]) -> dict[str, str]:
    """Returns the name of each shard by path: its file name, with folders if file names are not unique."""
    names = {path: _stem(path) for path in paths}
    if len(set(names.values())) == len(paths):
        return names
    parts = {path: path.removesuffix(".tar").split("/") for path in paths}
    differing = next(place for place, each in enumerate(zip(*parts.values(), strict=False)) if len(set(each)) > 1)
    return {path: "/".join(part[differing:]) for path, part in parts.items()}


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".tar")
