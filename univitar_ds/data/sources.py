"""Which shards a run reads: the sources of its configuration, looked up and checked before anything starts."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from univitar_ds.config.schema import SourceConfig, StageConfig
from univitar_ds.data import captions, tar
from univitar_ds.data.journal import JOURNAL
from univitar_ds.data.layout import Modality
from univitar_ds.data.manifest import MANIFEST, read_manifest
from univitar_ds.data.storage import Storage, storage_for
from univitar_ds.errors import DataError, SampleError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")
_MOST_SHARDS = 1_000_000
PACK_HINT = "pack the folder first: univitar-ds data pack FOLDER OUT"


@dataclass(frozen=True)
class Shard:
    """One tar. `name` is unique within the run and tells where a sample came from; `size` in bytes.

    `modality` None: what is in it is unknown, both kinds of stream read it and skip what is not theirs.
    """

    name: str
    path: str
    storage: Storage
    size: int
    modality: Modality | None = None
    sha256: str | None = None


def stage_modalities(stage: StageConfig) -> set[Modality]:
    """What a stage reads."""
    used: dict[Modality, bool] = {"image": stage.video_ratio < 1, "video": stage.video_ratio > 0}
    return {modality for modality, wanted in used.items() if wanted}


def validate_sources(sources: Sequence[SourceConfig], stages: Sequence[StageConfig]) -> list[Shard]:
    """All shards of the sources in reading order, after checking that every modality of the stages has some.

    Cheap (names and sizes only); call it before starting processes.
    Raises: DataError if a source has no shard, lacks its split, has a missing or cut shard, or nothing at all
    holds one of the modalities.
    """
    shards = find_shards(sources)
    for modality in sorted(set().union(*map(stage_modalities, stages))):
        if not of_modality(shards, modality):
            present = sorted({shard.modality for shard in shards if shard.modality})
            raise DataError(
                f"the run needs {modality} samples, but the sources ({', '.join(s.path for s in sources)}) hold only "
                f"{' and '.join(present)} samples; add a source with {modality} samples or set video_ratio "
                f"to {0 if modality == 'video' else 1} in every stage"
            )
    return shards


def find_shards(sources: Sequence[SourceConfig]) -> list[Shard]:
    """All shards of the sources, each source's in the order of its manifest or of the names.

    Shard names carry the position of their source when there are several, so that keys stay unique.
    Raises: DataError.
    """
    found = []
    for position, source in enumerate(sources):
        prefix = f"{position}:" if len(sources) > 1 else ""
        shards = _shards_of(source, prefix)
        if not shards:
            raise DataError(f"source {source.path}: no shard found (*.tar); {PACK_HINT}")
        found += shards
    return found


def of_modality(shards: Sequence[Shard], modality: Modality) -> list[int]:
    """Indices of the shards that may hold samples of this modality."""
    return [index for index, shard in enumerate(shards) if shard.modality in (None, modality)]


def fingerprint(shards: Iterable[Shard]) -> str:
    """Identity of the data: names, sizes and, where a manifest has them, hashes of all shards in order."""
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        state.update(f"{shard.name}\0{shard.size}\0{shard.sha256 or ''}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def iterate_captions(sources: Sequence[SourceConfig], *, limit: int) -> Iterator[str]:
    """Up to about `limit` captions, as many from each shard; samples whose texts are unreadable have none.

    Raises: DataError as `find_shards` does, or for a damaged shard.
    """
    shards = find_shards(sources)
    share = -(-limit // len(shards))
    for shard in shards:
        yield from itertools.islice(_captions_of(shard), share)


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> three names, zeros kept; `{x,y}` lists too. A name without braces is itself.

    Raises: DataError for a range that runs backwards or expands to more than a million names.
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
    if total > _MOST_SHARDS:
        raise DataError(f"source {pattern}: expands to {total} shards (limit {_MOST_SHARDS}); narrow the range")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _captions_of(shard: Shard) -> Iterator[str]:
    with shard.storage.open(shard.path) as stream:
        for group in tar.groups(stream, shard.name, shard.size):
            texts = {
                member.extension: shard.storage.read_range(shard.path, member.offset, member.length)
                for member in group.members
                if member.extension in captions.EXTENSIONS and member.length <= captions.BYTES_LIMIT
            }
            with suppress(SampleError):
                yield from captions.read_texts(texts).captions


def _alternatives(text: str, pattern: str) -> list[str]:
    match = _RANGE.match(text)
    if not match:
        return text.split(",")
    first, last = match.groups()
    if int(first) > int(last):
        raise DataError(f"source {pattern}: the range {{{text}}} runs backwards; write {{{last}..{first}}}")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    if int(last) - int(first) >= _MOST_SHARDS:
        raise DataError(f"source {pattern}: {{{text}}} is more than {_MOST_SHARDS} shards; narrow the range")
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _shards_of(source: SourceConfig, prefix: str) -> list[Shard]:
    path = os.path.expanduser(source.path)
    storage = storage_for(path)
    if path.endswith(".tar"):
        return _listed(expand_braces(path), storage, prefix, source.path)
    if _BRACES.search(path):
        raise DataError(f"source {source.path}: a brace range must name tars, e.g. train-{{000000..000127}}.tar")
    if not os.path.exists(path):
        raise DataError(f"source {source.path}: there is no such file or folder; check the path")
    if not os.path.isdir(path):
        raise DataError(f"source {source.path}: is neither a folder nor a .tar file; {PACK_HINT}")
    if any(os.path.exists(os.path.join(path, name)) for name in (MANIFEST, JOURNAL)):
        return _packed(source, path, storage, prefix)
    return _listed([name for name in storage.list(path) if name.endswith(".tar")], storage, prefix, source.path)


def _listed(paths: Sequence[str], storage: Storage, prefix: str, source: str) -> list[Shard]:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"source {source}: shard {missing[0]} is missing ({len(missing)} of {len(paths)} are); "
            "restore it or correct the source"
        )
    return [Shard(prefix + _stem(path), path, storage, storage.size(path)) for path in paths]


def _packed(source: SourceConfig, folder: str, storage: Storage, prefix: str) -> list[Shard]:
    manifest = read_manifest(folder)
    rows = [row for row in manifest["shards"] if source.split in (None, row["split"])]
    if not rows:
        present = sorted({row["split"] for row in manifest["shards"]})
        raise DataError(
            f"source {source.path}: has no split {source.split!r}; it has {', '.join(present) or 'no shard at all'}"
        )
    shards = []
    for row in rows:
        path = os.path.join(folder, row["file"])
        if not os.path.isfile(path):
            raise DataError(
                f"source {source.path}: shard {row['file']} of its manifest is missing; restore it or pack again"
            )
        size = storage.size(path)
        if size != row["bytes"]:
            raise DataError(
                f"shard {path}: has {size} bytes, its manifest says {row['bytes']}; "
                "it was cut or replaced: restore it or pack the folder again"
            )
        shards.append(Shard(prefix + _stem(path), path, storage, size, row["kind"], row.get("sha256")))
    return shards


def _stem(path: str) -> str:
    return os.path.basename(path).removesuffix(".tar")
