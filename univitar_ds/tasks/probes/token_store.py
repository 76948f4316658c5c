"""Tokens of a data set in a file, from which random items are read, so that memory holds only the items of a step.

The encoder thus runs once over the training items, for any number of epochs. The file has no name: the system frees its
space when the program ends, also when it is killed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from univitar_ds.errors import CheckpointError, StorageError, writing
from univitar_ds.geometry import cumulative

_SPARE_BYTES = 1 << 30
"""Space that is left free on the disk."""
_LARGEST = 65504.0
"""The largest float16."""


class RowStore:
    """Rows of numbers in a file without a name, in the order in which they are appended. A context manager.

    Args: folder: determines the disk, created if absent; width: numbers of a row; dtype: type of numpy.
    """

    def __init__(self, folder: Path, width: int, dtype: type) -> None:
        self._folder, self.width, self._dtype = folder, width, np.dtype(dtype)
        self.rows = 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Appends rows (n, width). Raises: StorageError if the disk is about to be full or cannot be written."""
        content = np.ascontiguousarray(rows, self._dtype)
        with writing(self._folder):
            state = os.fstatvfs(self._file.fileno())
            free = state.f_bavail * state.f_frsize
            if free < content.nbytes + _SPARE_BYTES:
                size = self.rows * self.width * self._dtype.itemsize
                raise StorageError(
                    f"{self.rows} tokens take {size / 1e9:.1f} GB, and the disk of {self._folder} has only "
                    f"{free / 1e9:.1f} GB left; name a folder on a larger disk with --cache, or use fewer items"
                )
            self._file.write(content.data)
            self._file.flush()
        self.rows += len(content)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Returns `count` rows from `begin` on, (count, width). Raises: StorageError if they cannot be read."""
        found = np.empty((count, self.width), self._dtype)
        left, place = memoryview(found).cast("B"), begin * self.width * self._dtype.itemsize
        while len(left):
            with writing(self._folder):
                got = os.preadv(self._file.fileno(), [left], place)
            if not got:
                raise StorageError(f"{self._folder}: tokens that were written cannot be read back; check the disk")
            left, place = left[got:], place + got
        return found


def checked(values: Tensor) -> Tensor:
    """Returns features (n, D). Raises: CheckpointError if one is not finite: NaN would be scored like a feature."""
    if wrong := int((~values.isfinite().all(dim=1)).sum()):
        raise CheckpointError(
            f"the features of the model are not finite in {wrong} of {len(values)} rows; its weights or its "
            "preprocessor_config.json are damaged, or its training has diverged: name another model"
        )
    return values


class TokenStore:
    """Tokens (T, D) of items, in float16. A context manager.

    Each dimension is stored relative to its mean and deviation in the first pack: some dimensions are hundreds of times
    larger than others, and in float16 would lose the differences between items. `read` and `standardised` return tokens
    that have mean 0 and variance 1 in each dimension over the whole store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: RowStore | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._scale: tuple[Tensor, Tensor] | None = None
        self.lengths: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows is not None:
            self._rows.__exit__()

    @property
    def width(self) -> int:
        """Dimensions of a token, D."""
        assert self._rows is not None, "a store without tokens"
        return self._rows.width

    def __len__(self) -> int:
        return len(self.lengths)

    def append(self, tokens: Tensor, lengths: Sequence[int]) -> None:
        """Appends the tokens of items. Args: tokens: (T, D) on any device.

        Raises: StorageError; CheckpointError if a token is not finite."""
        tokens = checked(tokens)
        if self._rows is None or self._first is None:
            self._rows = RowStore(self._folder, tokens.shape[1], np.float16)
            self._sums, self._squares = torch.zeros(2, tokens.shape[1], dtype=torch.float64)
            wide = tokens.double()
            self._first = wide.mean(0).float(), wide.std(0, correction=0).clamp(min=1e-6).float()
        mean, deviation = self._first
        stored = ((tokens.float() - mean) / deviation).clamp(-_LARGEST, _LARGEST).half().cpu()
        wide = stored.double()
        self._sums += wide.sum(0)
        self._squares += wide.square().sum(0)
        self._rows.append(stored.numpy())
        self.lengths += lengths

    def finish(self, device: torch.device) -> None:
        """Must be called after the last `append` and before `read` and `standardised`, which return tokens on
        `device`."""
        assert self._rows is not None, "a store without tokens"
        assert self._first is not None
        mean = self._sums / self._rows.rows
        deviation = (self._squares / self._rows.rows - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        self._scale = mean.float().to(device), deviation.float().to(device)
        self._first = self._first[0].to(device), self._first[1].to(device)
        self._begins = cumulative(self.lengths)

    def read(self, items: Sequence[int]) -> Tensor:
        """Returns the standardised tokens of some items, one after the other: (T, D) float32 on the device."""
        assert self._rows is not None, "a store without tokens"
        assert self._scale is not None, "finish comes first"
        parts = [self._rows.read(self._begins[item], self.lengths[item]) for item in items]
        mean, deviation = self._scale
        return (torch.from_numpy(np.concatenate(parts)).to(mean.device).float() - mean) / deviation

    def begin(self, item: int) -> int:
        """Returns the row of an item's first token."""
        return self._begins[item]

    def standardised(self, tokens: Tensor) -> Tensor:
        """Standardises tokens of items that are not in the store as `read` does, (T, D) float32 on the device."""
        assert self._first is not None, "a store without tokens"
        assert self._scale is not None, "finish comes first"
        (first, spread), (mean, deviation) = self._first, self._scale
        return ((tokens.float() - first) / spread - mean) / deviation

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
