"""Features of the items of a source, computed once by several processes and kept in the user's cache.

An entry is a result as `univitar-ds embed` writes it, in parts, so that a call that was killed continues with the first
unfinished part. Its name is a hash of all that determines the features: the content of the model, the data, type,
preprocessing and versions. `complete.json` is written last, with checksums. An entry that is damaged is computed again.
At most `KEPT_BYTES` of entries are kept; the least recently used ones are removed, unfinished ones only after
`ABANDONED_S`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from univitar_ds.atomic_write import replace_text
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.sources import SourceShard, of_modality
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import CheckpointError, ConfigError, StorageError, writing
from univitar_ds.inference.embed_files import for_places, write_parts
from univitar_ds.inference.reading import Kind, LeftOut
from univitar_ds.inference.sources import Place
from univitar_ds.inference.workers import AnySetup, device_of
from univitar_ds.inference.writing.destination import Destination, FinishedPart
from univitar_ds.inference.writing.parts import SafetensorsPart
from univitar_ds.owned import is_marked, mark, remove
from univitar_ds.regular_files import open_regular, read_bytes
from univitar_ds.screen import progress_bar
from univitar_ds.tasks.sources import shards_of

FORMAT = 2
PART_ROWS = 512
"""Items of a part: a call that was killed computes at most so many again."""
KEPT_BYTES = 20 << 30
ABANDONED_S = 7 * 86400
"""Age of unfinished entries that are removed: a call that was killed may be continued until then."""
SHOWN_BYTES = 1 << 30
"""Size from which reading the checksums of an entry has a progress bar: some seconds on a local disk."""
KIND = "features"
INDEX = "features.safetensors.index.json"
_OUT = "features.safetensors"
_COMPLETE = "complete.json"
_PROGRESS = f".{_OUT}.progress"
_NAMES = {
    r"features-\d{5,}\.safetensors|features\.safetensors\.(index\.json|bad\.jsonl)|complete\.json|\.univitar-ds": None,
    r"\.features\.safetensors\.progress": {r"part-\d{5,}\.json|settings\.json|lock": None},
}
_CHUNK = 1 << 24
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vectors:
    """Features (n, D) float32 of the n items with these keys, and the items that could not be read.

    `grids`: (n, 3) int64, the tokens of each item along time, height and width."""

    values: Tensor
    keys: list[str]
    left_out: list[LeftOut]
    grids: Tensor


class FeatureModel(Protocol):
    """A model whose features are cached."""

    name: str
    nproc: int

    def settings(self, setup: Any, places: Sequence[SourceShard]) -> dict[str, Any]:
        """Returns all that determines the features."""


@dataclass(frozen=True)
class Request:
    """Features that are asked for: of the items in `places`, computed by `nproc` processes.

    `settings`: all that determines them; `about`: what only people read; `title`: for messages and, with `progress`,
    for the progress bar."""

    setup: AnySetup
    places: Sequence[Place]
    settings: Mapping[str, Any]
    nproc: int
    about: Mapping[str, Any]
    title: str
    progress: bool

    @classmethod
    def of(cls, model: FeatureModel, setup: AnySetup, source: SourceConfig, *, progress: bool) -> Request:
        """Returns the request for all items of a source that `setup` reads. Raises: DataError as `find_shards`."""
        # Texts and labels are read each time, so that all tasks share an entry.
        plain = source.model_copy(update={"class_names": None, "captions": "one"})
        places = shards_of(plain, StorageSettings.of(setup.reading.data))
        if setup.reading.only is not None:  # shards of the other modality alone are not even scanned
            places = [places[index] for index in of_modality(places, setup.reading.only)]
        setup = replace(setup, reading=for_places(setup.reading, places))
        settings = {**model.settings(setup, places), "files": _times(places), "versions": versions()}
        about = {"model": model.name, "data": source.path, "split": source.split}
        title = f"features of {source.split or 'all splits'}"
        return cls(setup, places, settings, model.nproc, about, title, progress)

    def entry(self, cache: Path) -> Path:
        """Returns the folder of the features in a cache."""
        return cache / hashlib.blake2b(json.dumps(self.settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    def compute(self, entry: Path, destination: Callable[[Path], Destination]) -> None:
        """Computes the unfinished parts of an entry, and marks it as complete. The entry is held.

        Raises: StorageError, and the errors of `inference.workers.compute`."""
        what = self.places, PART_ROWS, self.title if self.progress else None
        with writing(entry):
            entry.mkdir(exist_ok=True)
        mark(entry, KIND)
        if not _can_continue(entry, self.settings):
            discard(entry)
            with writing(entry):
                entry.mkdir(exist_ok=True)
            mark(entry, KIND)
        written = destination(entry / _OUT)
        if written.completed(self.settings) is None:
            with written.opened(self.settings) as done:
                if done:
                    logger.info("continuing with part %d of %s", done, entry)
                write_parts(written, done, self.setup, self.nproc, what)
                written.complete()
        _complete(entry, self.about)


class _VectorDestination(Destination):
    """Parts of vectors, with the grid of each item."""

    def begin(self, number: int, kind: Kind, width: int) -> SafetensorsPart:
        return SafetensorsPart(self._path(number), kind, width, grids=True)


def features(
    model: FeatureModel, setup: AnySetup, source: SourceConfig, cache: Path, *, progress: bool = True
) -> Vectors:
    """Returns the features of all items of a source, in the order of the shards.

    Args: setup: model, type and preprocessing of the features; cache: folder of the entries.
    Raises: DataError or CheckpointError as `inference.workers.compute`, also for features that are not finite;
        StorageError if the cache cannot be written.
    """
    request = Request.of(model, setup, source, progress=progress)
    entry = request.entry(cache)
    with held(entry):
        title = request.title if progress else None
        found = _read(entry, setup.kind, title)
        if found is None:
            request.compute(entry, _VectorDestination)
            found = _read(entry, setup.kind, title)
        else:
            logger.info("%s are read from the cache, %s", request.title, entry)
        if found is None:
            raise damaged(entry)
        touch(entry)
    make_room(cache, entry)
    check_finite(found.values, f"{request.title} by {model.name}")
    return found


def check_finite(values: Tensor, what: str) -> None:
    """Checks features (n, D). Raises: CheckpointError if one is not finite: NaN would be scored like a feature."""
    if wrong := int((~values.isfinite().all(dim=1)).sum()):
        raise CheckpointError(
            f"the {what} are not finite in {wrong} of {len(values)} rows; its weights or its preprocessor_config.json "
            "are damaged, or its training has diverged: name another model"
        )


def damaged(entry: Path) -> StorageError:
    """Returns the error of an entry that cannot be read right after writing."""
    return StorageError(f"{entry} is damaged right after writing; check the disk, or name another --cache")


def touch(entry: Path) -> None:
    """Notes that an entry is used now."""
    with suppress(OSError):  # the entry may belong to another user
        os.utime(entry / _COMPLETE)


def _times(places: Sequence[SourceShard]) -> list[list[int]]:
    """Returns sizes and times of local shards: a shard may change while its name, size and first bytes do not."""
    found = []
    for place in places:
        with suppress(OSError):  # on S3
            state = os.stat(place.path)
            found.append([state.st_size, state.st_mtime_ns])
    return found


def versions() -> list[str]:
    """Returns the versions that determine features beside the model and the data."""
    return [str(FORMAT), torch.__version__, device_of(0).type]


@contextmanager
def held(entry: Path, *, shared: bool = False) -> Iterator[None]:
    """Locks an entry for the body. If another process has locked it, waits until that process has finished.

    Args: shared: other processes may share the lock; none computes or removes the entry meanwhile."""
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    lock = entry.with_name(f".{entry.name}.lock")  # not in the entry, which may be removed
    with writing(lock):
        entry.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    with file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process uses the same features in %s; waiting for it", entry)
            fcntl.flock(file, how)
        yield


def _can_continue(entry: Path, settings: Mapping[str, Any]) -> bool:
    """Whether an entry is new, or has undamaged records and parts of an interrupted call with the same settings."""
    try:
        progress = entry / _PROGRESS
        if progress.is_dir():
            records = [FinishedPart.read(file) for file in progress.glob("part-*.json")]
            for part in {one.file for one in records}.intersection(os.listdir(entry)):
                _check_part(entry / part)
            begun = not (progress / "settings.json").exists()
            return begun or json.loads(read_bytes(progress / "settings.json")) == json.loads(json.dumps(settings))
        names = [name for name in os.listdir(entry) if name.startswith("features")]
        if not names:
            return True
        for part in json.loads(read_bytes(entry / INDEX))["parts"]:
            _check_part(entry / part["file"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, ConfigError) as error:
        warn_damaged(entry, error)
        return False
    return True


def _check_part(path: Path) -> None:
    """Checks that a part has its whole header, and as many bytes as that says.

    Raises: OSError or SafetensorError; a power failure may leave a file shorter than it was written."""
    with open_regular(path), safe_open(path, "pt"):
        pass


def discard(entry: Path) -> None:
    """Removes a damaged entry. Raises: StorageError if it has files that this program did not write."""
    if not (is_marked(entry, KIND) and remove(entry, _NAMES)):
        raise StorageError(f"{entry} holds other files than this program's; move them away, or name another --cache")


def _complete(entry: Path, about: Mapping[str, Any]) -> None:
    """Marks an entry as complete, with the checksums of its files. Args: about: entries that only people read."""
    names = sorted(name for name in os.listdir(entry) if name.startswith("features"))
    with writing(entry):
        sums = {name: _sum_of(entry / name) for name in names}
    replace_text(entry / _COMPLETE, json.dumps({"format": FORMAT, **about, "crc32": sums}) + "\n")


def is_finished(entry: Path) -> bool:
    """Whether an entry was marked as complete; it may be damaged since."""
    return (entry / _COMPLETE).is_file()


def is_complete(entry: Path, title: str | None = None) -> bool:
    """Whether an entry is complete and undamaged. Reads all of its files, headers first; for a damaged one, warns.

    Args: title: of the features, for the progress bar, which large entries have; None: no bar."""
    if not is_finished(entry):
        return False
    try:
        sums = json.loads(read_bytes(entry / _COMPLETE))["crc32"]
        if INDEX not in sums:
            raise ValueError(f"no {INDEX}")
        for name in sums:  # finds a part that is cut without reading all others
            if name.endswith(".safetensors"):
                _check_part(entry / name)
        size = sum((entry / name).stat().st_size for name in sums)
        shown = title is not None and size >= SHOWN_BYTES
        with progress_bar(total=size, desc=f"checking {title}", unit="B", unit_scale=True, disable=not shown) as bar:
            for name in sums:
                if _sum_of(entry / name, bar.update) != sums[name]:
                    raise ValueError(f"{name} has other bytes than were written")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        warn_damaged(entry, error)
        return False
    return True


def _sum_of(path: Path, read: Callable[[int], object] = lambda count: None) -> int:
    """Returns the checksum of a file. Args: read: is called with the number of bytes of each read."""
    total = 0
    with open_regular(path) as file:
        while part := file.read(_CHUNK):
            total = zlib.crc32(part, total)
            read(len(part))
    return total


def warn_damaged(entry: Path, error: BaseException | None) -> None:
    """Warns that an entry is computed again."""
    logger.warning("the features in %s are damaged and computed again (%s)", entry, error)


def _read(entry: Path, kind: Kind, title: str | None) -> Vectors | None:
    """Returns a complete entry; None if it is incomplete, or damaged: then it is removed, with a warning.

    Args: title: as for `is_complete`."""
    if not is_finished(entry):
        return None
    if not is_complete(entry, title):
        discard(entry)
        return None
    try:
        index = json.loads(read_bytes(entry / INDEX))
        parts = [load(read_bytes(entry / part["file"])) for part in index["parts"]]
        values, grids = (torch.cat([part[name] for part in parts]) for name in (kind, "grid_thw"))
        found = Vectors(values, index["key"], left_out(entry), grids)
        if not len(found.values) == len(found.keys) == len(grids):
            raise ValueError(f"{len(found.values)} rows, {len(found.keys)} keys")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        warn_damaged(entry, error)
        discard(entry)
        return None
    return found


def left_out(entry: Path) -> list[LeftOut]:
    """Returns the items that could not be read."""
    path = entry / f"{_OUT}.bad.jsonl"
    return [LeftOut(**json.loads(line)) for line in read_bytes(path).splitlines()] if path.is_file() else []


def make_room(cache: Path, own: Path | None) -> None:
    """Removes the least recently used entries until at most `KEPT_BYTES` are left. `own`, entries in use, and those of
    calls that may be continued stay."""
    used = []
    for entry in cache.iterdir():
        if is_marked(entry, KIND):
            with suppress(OSError):  # another process removes it
                complete = (entry / _COMPLETE).exists()
                age = ((entry / _COMPLETE) if complete else entry).stat().st_mtime
                if complete or time.time() - age > ABANDONED_S:
                    used.append((age, entry, sum(file.stat().st_size for file in entry.iterdir())))
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
