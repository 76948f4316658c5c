"""Features of the items of a source, computed once by several processes and kept in the user's cache.

An entry is a result as `univitar-ds embed` writes it, in parts, so that a call that was killed continues with the first
unfinished part. Its name is a hash of all that determines the features: the content of the model, the data, type,
preprocessing and versions. `complete.json` is written last, with checksums. An entry that is damaged is computed again.
At most `KEPT_BYTES` of entries are kept; the least recently used ones are removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import CheckpointError, StorageError, writing
from univitar_ds.inference.embed_files import for_places, write_parts
from univitar_ds.inference.reading import Kind, LeftOut
from univitar_ds.inference.workers import AnySetup, device_of
from univitar_ds.inference.writing.destination import Destination
from univitar_ds.owned import is_marked, mark, remove
from univitar_ds.regular_files import read_bytes
from univitar_ds.tasks.sources import shards_of

FORMAT = 1
PART_ROWS = 512
"""Items of a part: a call that was killed computes at most so many again."""
KEPT_BYTES = 20 << 30
KIND = "features"
_OUT = "features.safetensors"
_COMPLETE = "complete.json"
_PROGRESS = f".{_OUT}.progress"
_NAMES = {
    r"features-\d{5,}\.safetensors|features\.safetensors\.(index\.json|bad\.jsonl)|complete\.json|\.univitar-ds": None,
    r"\.features\.safetensors\.progress": {r"part-\d{5,}\.json|settings\.json|lock": None},
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vectors:
    """Features (n, D) float32 of the n items with these keys, and the items that could not be read."""

    values: Tensor
    keys: list[str]
    left_out: list[LeftOut]


class FeatureModel(Protocol):
    """A model whose features are cached."""

    name: str
    nproc: int

    def settings(self, setup: Any, places: Sequence[SourceShard]) -> dict[str, Any]:
        """Returns all that determines the features."""


def features(
    model: FeatureModel, setup: AnySetup, source: SourceConfig, cache: Path, *, progress: bool = True
) -> Vectors:
    """Returns the features of all items of a source, in the order of the shards.

    Args: setup: model, type and preprocessing of the features; cache: folder of the entries.
    Raises: DataError or CheckpointError as `inference.workers.compute`, also for features that are not finite;
        StorageError if the cache cannot be written.
    """
    # Texts and labels are read each time, so that all tasks share an entry.
    plain = source.model_copy(update={"class_names": None, "captions": "one"})
    places = shards_of(plain, StorageSettings.of(setup.reading.data))
    setup = replace(setup, reading=for_places(setup.reading, places))
    settings = {**model.settings(setup, places), "files": _times(places), "versions": _versions()}
    entry = cache / hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
    split = source.split or "all splits"
    with _held(entry):
        found = _read(entry, setup.kind)
        if found is None:
            what = places, PART_ROWS, f"features of {split}" if progress else None
            _compute(entry, settings, lambda out, done: write_parts(out, done, setup, model.nproc, what))
            _complete(entry, {"model": model.name, "data": source.path, "split": source.split})
            found = _read(entry, setup.kind)
        else:
            logger.info("features of %s are read from the cache, %s", split, entry)
        if found is None:
            raise StorageError(f"{entry} is damaged right after writing; check the disk, or name another --cache")
        with suppress(OSError):  # the entry may belong to another user
            os.utime(entry / _COMPLETE)
    _make_room(cache, entry)
    if wrong := int((~found.values.isfinite().all(dim=1)).sum()):
        raise CheckpointError(
            f"the features of {model.name} are not finite for {wrong} of {len(found.keys)} items of {split}; its "
            "weights or its preprocessor_config.json are damaged, or its training has diverged: name another model"
        )
    return found


def _times(places: Sequence[SourceShard]) -> list[list[int]]:
    """Returns sizes and times of local shards: a shard may change while its name, size and first bytes do not."""
    found = []
    for place in places:
        with suppress(OSError):  # on S3
            state = os.stat(place.path)
            found.append([state.st_size, state.st_mtime_ns])
    return found


def _versions() -> list[str]:
    return [str(FORMAT), torch.__version__, device_of(0).type]


@contextmanager
def _held(entry: Path) -> Iterator[None]:
    """Locks an entry for the body. If another process has locked it, waits until that process has finished."""
    lock = entry.with_name(f".{entry.name}.lock")  # not in the entry, which may be removed
    with writing(lock):
        entry.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process computes the same features into %s; waiting for it", entry)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compute(entry: Path, settings: Mapping[str, Any], write: Callable[[Destination, int], None]) -> None:
    """Writes the unfinished parts of an entry. Raises: StorageError, and the errors of `write`."""
    with writing(entry):
        entry.mkdir(exist_ok=True)
    mark(entry, KIND)
    if not _can_continue(entry, settings):
        _discard(entry)
        with writing(entry):
            entry.mkdir(exist_ok=True)
        mark(entry, KIND)
    destination = Destination(entry / _OUT)
    if destination.completed(settings) is None:
        with destination.opened(settings) as done:
            if done:
                logger.info("continuing with part %d of %s", done, entry)
            write(destination, done)
            destination.complete()


def _can_continue(entry: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an entry is new, or has undamaged records of an interrupted call with the same settings."""
    try:
        progress = entry / _PROGRESS
        if progress.is_dir():
            wanted = json.loads(json.dumps(settings))
            records = [json.loads(read_bytes(file)) for file in progress.glob("part-*.json")]
            begun = not (progress / "settings.json").exists()
            return all(isinstance(one, dict) for one in records) and (
                begun or json.loads(read_bytes(progress / "settings.json")) == wanted
            )
        names = [name for name in os.listdir(entry) if name.startswith("features")]
        if not names:
            return True
        parts = json.loads(read_bytes(entry / f"{_OUT}.index.json"))["parts"]
        return all((entry / part["file"]).is_file() for part in parts)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _discard(entry: Path) -> None:
    """Removes a damaged entry. Raises: StorageError if it has files that this program did not write."""
    if not (is_marked(entry, KIND) and remove(entry, _NAMES)):
        raise StorageError(f"{entry} holds other files than this program's; move them away, or name another --cache")


def _complete(entry: Path, about: Mapping[str, Any]) -> None:
    """Marks an entry as complete, with the checksums of its files. Args: about: entries that only people read."""
    names = sorted(name for name in os.listdir(entry) if name.startswith("features"))
    with writing(entry):
        sums = {name: zlib.crc32(read_bytes(entry / name)) for name in names}
    replace_text(entry / _COMPLETE, json.dumps({"format": FORMAT, **about, "crc32": sums}) + "\n")


def _read(entry: Path, kind: Kind) -> Vectors | None:
    """Returns a complete entry; None if it is incomplete, or damaged: then it is removed, with a warning."""
    if not (entry / _COMPLETE).is_file():
        return None
    try:
        sums = json.loads(read_bytes(entry / _COMPLETE))["crc32"]
        files = {name: read_bytes(entry / name) for name in sums}
        wrong = [name for name, data in files.items() if zlib.crc32(data) != sums[name]]
        if wrong:
            raise ValueError(f"{wrong[0]} has other bytes than were written")
        index = json.loads(files[f"{_OUT}.index.json"])
        values = [load(files[part["file"]])[kind] for part in index["parts"]]
        lines = files.get(f"{_OUT}.bad.jsonl", b"").splitlines()
        found = Vectors(torch.cat(values), index["key"], [LeftOut(**json.loads(line)) for line in lines])
        if len(found.values) != len(found.keys):
            raise ValueError(f"{len(found.values)} rows, {len(found.keys)} keys")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        logger.warning("the features in %s are damaged and computed again (%s)", entry, error)
        _discard(entry)
        return None
    return found


def _make_room(cache: Path, own: Path) -> None:
    """Removes the least recently used entries until at most `KEPT_BYTES` are left. `own` and entries in use stay."""
    used = []
    for entry in cache.iterdir():
        if is_marked(entry, KIND):
            with suppress(OSError):  # another process removes it
                state = (entry / _COMPLETE) if (entry / _COMPLETE).exists() else entry
                used.append((state.stat().st_mtime, entry, sum(file.stat().st_size for file in entry.iterdir())))
    left = sum(size for _, _, size in used)
    for _, entry, size in sorted(used):
        if left <= KEPT_BYTES:
            return
        if entry != own and _removed(entry):
            logger.info("removed %s, the least recently used features", entry)
            left -= size


def _removed(entry: Path) -> bool:
    with suppress(OSError), entry.with_name(f".{entry.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return remove(entry, _NAMES)
    return False
