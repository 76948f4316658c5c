"""Tokens in a cache without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from univitar_ds.inference.reading import Rows
from univitar_ds.inference.sources import Unit
from univitar_ds.tasks.cached.feature_cache import Request
from univitar_ds.tasks.cached.token_cache import Tokens, tokens


@dataclass(frozen=True)
class GivenTokens:
    """Has the tokens (t, D) of item i under the name i, in place of a model's. `computed` collects the names."""

    items: Sequence[torch.Tensor]
    computed: list[str]
    kind: str = "tokens"

    def read(self, rank: int, units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
        for unit in units:
            some = [self.items[int(name)] for name in unit.files]
            self.computed.extend(unit.files)
            values = torch.cat(some).numpy().astype(np.float32)
            yield Rows(unit, list(unit.files), [(1, 1, len(one)) for one in some], values, [])


def given(
    items: Sequence[torch.Tensor],
    computed: list[str] | None = None,
    nproc: int = 1,
    setup: GivenTokens | None = None,
) -> Request:
    """The request for such tokens."""
    setup = setup or GivenTokens(items, [] if computed is None else computed)
    names = tuple(str(index) for index in range(len(items)))
    settings = {"items": [float(one.double().sum()) for one in items]}
    return Request(setup, [names], settings, nproc, {"model": "made up"}, "features of some", progress=False)


def cached(folder: Path, *splits: Sequence[torch.Tensor], most_gb: float = 1) -> AbstractContextManager[list[Tokens]]:
    """The tokens of some splits, read from a cache."""
    return tokens([given(items) for items in splits], folder, most_gb)
