"""All tokens of the items of a source, computed once by several processes and read at random from memory-mapped files.

An entry is one of `feature_cache` with parts of this format: each token is a row of 2-byte numbers, first its D values
in float16, then further columns (the labels of its pixels, in the dense probe). Values are relative to the mean and the
deviation of each dimension over the first items: some dimensions are hundreds of times larger than others, and in
float16 would lose the differences between items. A part that was killed is computed again, finished ones are kept.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from univitar_ds.errors import StorageError
from univitar_ds.geometry import cumulative
from univitar_ds.inference.reading import Kind, LeftOut, Rows
from univitar_ds.inference.sources import count_items
from univitar_ds.inference.writing.destination import Destination, FinishedPart
from univitar_ds.inference.writing.parts import HEADER, SafetensorsFile
from univitar_ds.regular_files import read_bytes
from univitar_ds.tasks.cached.feature_cache import (
    INDEX,
    Request,
    check_finite,
    damaged,
    discard,
    held,
    is_complete,
    is_finished,
    left_out,
    make_room,
    touch,
    warn_damaged,
)

MOST_GB = 200
"""Default maximum size of the tokens of a split, in GB."""
_SPARE_BYTES = 1 << 30
"""Space that is left free on the disk."""
_LARGEST = 65504.0
"""The largest float16."""
_DAMAGED = (FileNotFoundError, ValueError, KeyError, TypeError, struct.error)
"""Errors of files of an entry that are damaged or gone."""
_AT_ONCE = 1 << 14
"""Number of tokens that are read at a time for the mean and deviation."""
logger = logging.getLogger(__name__)


class _DamagedPart(StorageError):
    """A finished part cannot be read."""


@contextmanager
def _reading_parts(entry: Path) -> Iterator[None]:
    """Raises: _DamagedPart for an error of `_DAMAGED`. The body only reads finished parts: an error of the same type
    while the model computes must not discard them."""
    try:
        yield
    except _DAMAGED as error:
        raise _DamagedPart(f"{damaged(entry)} ({error})") from error


@dataclass(frozen=True)
class TokenRows(Rows):
    """The tokens of a unit, with further columns of each token: `columns` (T, C) int16; `classes`: the labels of the
    unit's pixels."""

    columns: np.ndarray | None = None
    classes: Sequence[int] = ()


@dataclass
class _Room:
    """The space of an entry. `rows`, `items`, `written`: tokens, items and bytes so far; `total`: number of items, None
    if it is unknown; `most_gb`: maximum size."""

    folder: Path
    most_gb: float
    total: int | None
    items: int = 0
    written: int = 0

    def check(self, size: int) -> None:
        """Checks that `size` more bytes can be written. Raises: StorageError."""
        state = os.statvfs(self.folder)
        free = state.f_bavail * state.f_frsize
        if free < size + _SPARE_BYTES:
            raise StorageError(
                f"the tokens of {self._so_far()} take {self.written / 1e9:.1f} GB, and the disk of {self.folder} has "
                f"only {free / 1e9:.1f} GB left; name a folder on a larger disk with --cache, or use fewer items"
            )
        if self.written + size > self.most_gb * 1e9:
            raise self._too_large(f"the tokens of {self._so_far()} take {(self.written + size) / 1e9:.3g} GB")

    def check_rest(self) -> None:
        """Checks the expected size of all items. Raises: StorageError."""
        expected = self.written / max(self.items, 1) * (self.total or 0)
        if expected > self.most_gb * 1e9:
            raise self._too_large(f"the tokens of {self.total} items take about {expected / 1e9:.3g} GB")

    def _so_far(self) -> str:
        return f"{self.items} items" if self.total is None else f"{self.items} of {self.total} items"

    def _too_large(self, what: str) -> StorageError:
        return StorageError(
            f"{what} in {self.folder}, above --max-gb {self.most_gb:g}; raise it (the same command then continues), or "
            "use fewer items or tokens"
        )


class _TokenPart(SafetensorsFile):
    """A part that is being written, see `inference.writing.parts.Part`. Tokens are written immediately.

    Args: scale: mean and deviation of the first items, (2, D) float32; None: they are those of the first unit."""

    def __init__(self, path: Path, scale: np.ndarray | None, room: _Room, model: str) -> None:
        super().__init__(path)
        self._room, self._model, self._scale = room, model, scale
        self._lengths: list[int] = []
        self._classes: set[int] = set()
        self._width = 0

    def add(self, rows: Rows) -> None:
        values = rows.values
        check_finite(torch.from_numpy(values), self._model)
        if self._scale is None and len(values):
            deviation = np.maximum(values.std(0, dtype=np.float64), 1e-6)
            self._scale = np.stack([values.mean(0, dtype=np.float64), deviation]).astype(np.float32)
        stored = np.empty((0, 0), np.int16)
        if len(values):
            mean, deviation = self._scale
            stored = ((values - mean) / deviation).clip(-_LARGEST, _LARGEST).astype(np.float16).view(np.int16)
            if isinstance(rows, TokenRows) and rows.columns is not None:
                stored = np.concatenate([stored, rows.columns], axis=1)
            self._width = stored.shape[1]
        self._room.check(stored.nbytes)
        self.append(np.ascontiguousarray(stored, "<i2"))
        self._room.written += stored.nbytes
        self._room.items += len(set(rows.keys)) + len(rows.left_out)
        self._lengths += [t * h * w for t, h, w in rows.grids]
        self._classes |= set(getattr(rows, "classes", ()))

    def finish(self) -> None:
        scale = np.empty((0, 0), np.float32) if self._scale is None else self._scale
        tensors = {
            "offsets": ("I64", np.array(cumulative(self._lengths), "<i8")),
            "scale": ("F32", scale.astype("<f4")),
            "classes": ("I64", np.array(sorted(self._classes), "<i8")),
        }
        count = sum(self._lengths)
        end = 2 * count * self._width
        header = {"rows": {"dtype": "I16", "shape": [count, self._width], "data_offsets": [0, end]}}
        for name, (dtype, values) in tensors.items():
            span = [end, end + values.nbytes]
            header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
            end = span[1]
        self.complete(header, b"".join(values.tobytes() for _, values in tensors.values()))


class _TokenDestination(Destination):
    """Parts of tokens that all have the scale of the first one."""

    def __init__(self, out: Path, room: _Room, model: str) -> None:
        super().__init__(out)
        self._room, self._model = room, model
        self._counted = False

    def part(self, number: int) -> FinishedPart:
        with _reading_parts(self.out.parent):
            return super().part(number)

    def begin(self, number: int, kind: Kind, width: int) -> _TokenPart:
        with _reading_parts(self.out.parent):
            if not self._counted:  # parts of an earlier call; later ones are counted as they are written
                done = [self.part(one) for one in range(number)]
                self._room.items = sum(len(set(one.keys)) + len(one.left_out) for one in done)
                self._room.written = sum(self._path(one).stat().st_size for one in range(number))
                self._counted = True
            scale = _Part.of(self._path(number - 1)).scale if number else None
        return _TokenPart(self._path(number), scale, self._room, self._model)

    def finish(self, number: int, part: _TokenPart, about: FinishedPart) -> None:
        super().finish(number, part, about)
        self._room.check_rest()


@dataclass(frozen=True)
class _Part:
    """A finished part. `rows`: (T, D + C) int16, mapped; `offsets`: (N + 1,); `scale`: (2, D), None without tokens."""

    rows: np.ndarray
    offsets: np.ndarray
    scale: np.ndarray | None
    classes: list[int]

    @classmethod
    def of(cls, path: Path) -> _Part:
        """Opens a part. Raises: OSError, ValueError or KeyError for a damaged file."""
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length != HEADER - 8:
                raise ValueError(f"{path.name} has a header of {length} bytes")
            header = json.loads(file.read(length))
            small = {}
            for name, dtype in (("offsets", "<i8"), ("scale", "<f4"), ("classes", "<i8")):
                begin, end = header[name]["data_offsets"]
                file.seek(HEADER + begin)
                small[name] = np.frombuffer(file.read(end - begin), dtype).reshape(header[name]["shape"])
        shape = tuple(header["rows"]["shape"])
        mapped = np.memmap(path, "<i2", "r", HEADER, shape) if shape[0] else np.empty(shape, np.int16)
        scale = small["scale"] if small["scale"].size else None
        return cls(mapped, small["offsets"], scale, small["classes"].tolist())


class Tokens:
    """The tokens of an entry, of which item i has `lengths[i]`.

    `keys`: of the items; in the dense probe an item is a window, and the windows of an image have the same key.
    `left_out`: items that could not be read; `classes`: see `TokenRows`; `width`: D; `scale`: mean and deviation,
    (2, D) float64, to which stored values are relative.
    """

    def __init__(self, entry: Path) -> None:
        """Opens a complete entry. Raises: OSError, ValueError or KeyError for a damaged one."""
        index = json.loads(read_bytes(entry / INDEX))
        self._parts = [_Part.of(entry / part["file"]) for part in index["parts"]]
        self.keys: list[str] = index["key"]
        self.left_out: list[LeftOut] = left_out(entry)
        self._begins = np.array(cumulative([len(one.offsets) - 1 for one in self._parts]))
        self.lengths: list[int] = [int(length) for one in self._parts for length in np.diff(one.offsets)]
        if len(self.lengths) != len(self.keys):
            raise ValueError(f"{len(self.lengths)} items, {len(self.keys)} keys")
        self.classes = sorted({label for one in self._parts for label in one.classes})
        scales = [one.scale for one in self._parts if one.scale is not None]
        self.scale = (
            torch.from_numpy(scales[0].astype(np.float64)) if scales else torch.empty(2, 0, dtype=torch.float64)
        )

    @property
    def width(self) -> int:
        """Dimensions of a token, D."""
        return self.scale.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def columns(self, items: Sequence[int]) -> np.ndarray:
        """Returns the further columns of the tokens of some items, (T, C) int16."""
        return self._rows(items)[:, self.width :]

    def read(self, items: Sequence[int], device: torch.device) -> Tensor:
        """Returns the tokens of some items, one after the other, as they are stored: (T, D) float32 on the device.

        The tokens of the model are these values times `scale[1]` plus `scale[0]`."""
        values = torch.from_numpy(np.ascontiguousarray(self._rows(items)[:, : self.width]).view(np.float16))
        return values.to(device).float()

    def _rows(self, items: Sequence[int]) -> np.ndarray:
        found = [np.empty((0, self.width), np.int16)] if not items else []
        for item in items:
            number = int(np.searchsorted(self._begins, item, side="right")) - 1
            part, row = self._parts[number], item - self._begins[number]
            found.append(part.rows[part.offsets[row] : part.offsets[row + 1]])
        return np.concatenate(found)

    def packs(self, items: Sequence[int], budget: int) -> Iterator[list[int]]:
        """Yields the items in order, in packs of at most `budget` tokens; a larger item is alone."""
        pack: list[int] = []
        tokens = 0
        for item in items:
            if pack and tokens + self.lengths[item] > budget:
                yield pack
                pack, tokens = [], 0
            pack.append(item)
            tokens += self.lengths[item]
        if pack:
            yield pack


class Standard:
    """Standardises tokens: mean 0 and variance 1 in each dimension over the items that a probe learns from."""

    def __init__(self, tokens: Tokens, items: Sequence[int], device: torch.device) -> None:
        self._device = device
        sums, squares = torch.zeros(2, tokens.width, dtype=torch.float64, device=device)
        for pack in tokens.packs(items, _AT_ONCE):
            values = tokens.read(pack, device).double()
            sums += values.sum(0)
            squares += values.square().sum(0)
        count = max(sum(tokens.lengths[item] for item in items), 1)
        mean, (first, spread) = (sums / count).cpu(), tokens.scale
        deviation = ((squares / count).cpu() - mean.square()).clamp(min=0).sqrt() * spread
        self._mean, self._deviation = mean * spread + first, deviation.clamp(min=1e-6)

    def read(self, tokens: Tokens, items: Sequence[int]) -> Tensor:
        """Returns the standardised tokens of some items, one after the other: (T, D) float32 on the device."""
        first, spread = tokens.scale
        # One product and one sum: a large mean, added and then subtracted, would round the differences.
        gain, shift = spread / self._deviation, (first - self._mean) / self._deviation
        return tokens.read(items, self._device) * gain.float().to(self._device) + shift.float().to(self._device)


@contextmanager
def tokens(requests: Sequence[Request], cache: Path, most_gb: float) -> Iterator[list[Tokens]]:
    """Computes what is missing, and opens the tokens of each request. Afterwards, at most as many entries are kept as
    of other features.

    Args: cache: folder of the entries; most_gb: maximum size of each.
    Raises: DataError or CheckpointError as `inference.workers.compute`, also for tokens that are not finite;
        StorageError if an entry is too large, or the cache cannot be written.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_opened(request, cache, most_gb)) for request in requests]
    make_room(cache, None)


@contextmanager
def _opened(request: Request, cache: Path, most_gb: float) -> Iterator[Tokens]:
    """Computes an entry if it is missing, and opens it. Raises: as `tokens`.

    The entry is held from then on: other requests may take hours, and calls that end meanwhile make room."""
    entry = request.entry(cache)
    while True:
        _ensure(request, cache, most_gb)
        with held(entry, shared=True):
            if not is_finished(entry):  # another call made room after `_ensure` had released the entry
                continue
            with _reading_parts(entry):
                found = Tokens(entry)
            touch(entry)
            yield found
            return


def _ensure(request: Request, cache: Path, most_gb: float) -> None:
    """Computes an entry if it is not complete. Raises: as `tokens`."""
    entry = request.entry(cache)
    title = request.title if request.progress else None
    with held(entry, shared=True):
        if is_complete(entry, title):
            logger.info("%s are read from the cache, %s", request.title, entry)
            return
    with held(entry):
        if is_complete(entry, title):  # another process has computed it meanwhile
            return
        if is_finished(entry):
            discard(entry)
        try:
            _compute(request, entry, most_gb)
        except _DamagedPart as error:  # of an earlier call
            warn_damaged(entry, error.__cause__)
            discard(entry)
            _compute(request, entry, most_gb)


def _compute(request: Request, entry: Path, most_gb: float) -> None:
    room = _Room(entry, most_gb, count_items(request.places))
    model = f"{request.title} by {request.about['model']}"
    request.compute(entry, lambda out: _TokenDestination(out, room, model))
    with _reading_parts(entry):
        Tokens(entry)
