"""Embeddings of items from several views: equal parts of a video, and square crops, as in Kinetics' protocols.

Each view is embedded as an item of its own, from the frames of its part and the pixels of its crop. The embedding of
the item is the mean of the unit vectors of its views.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import torch
import torch.nn.functional as F

from univitar_ds.errors import ConfigError
from univitar_ds.geometry import Modality
from univitar_ds.inference.reading import LeftOut
from univitar_ds.inference.workers import Setup
from univitar_ds.peers.setup import PeerSetup
from univitar_ds.tasks.cached.feature_cache import Vectors

MOST_VIEWS = 100
"""Maximum number of views of an item: each is a pass over the data. Published protocols have at most 30."""
AnySetup = TypeVar("AnySetup", Setup, PeerSetup)


@dataclass(frozen=True)
class ItemViews:
    """Numbers of parts of a video and of crops of an item. 1 is the whole video, and the whole image or frame.

    Raises: ConfigError for more than `MOST_VIEWS` views."""

    parts: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if self.parts * self.crops > MOST_VIEWS:
            raise ConfigError(
                f"--clips {self.parts} and --crops {self.crops} are {self.parts * self.crops} passes over the data; "
                f"give at most {MOST_VIEWS}"
            )

    def of(self, setup: AnySetup, modality: Modality) -> list[AnySetup]:
        """Returns the settings of each view of an item, `setup` itself if it is the only one."""
        parts = self.parts if modality == "video" else 1
        if parts == self.crops == 1:
            return [setup]
        found = []
        for part, crop in product(range(parts), range(self.crops)):
            sampling = replace(setup.reading.sampling, part=part, parts=parts)
            cut = (crop, self.crops) if self.crops > 1 else None
            found.append(replace(setup, reading=replace(setup.reading, sampling=sampling, crop=cut, only=modality)))
        return found

    def note(self, modality: Modality) -> list[str]:
        """Returns a sentence about the views of an item, if there are several."""
        parts = self.parts if modality == "video" else 1
        if parts == self.crops == 1:
            return []
        counts = [f"{count} {what}" for count, what in ((parts, "parts"), (self.crops, "crops")) if count > 1]
        return [f"Embeddings of {modality}s are the mean over {' x '.join(counts)}."]


def mean_of(views: Sequence[Vectors]) -> Vectors:
    """Returns the mean of the unit vectors of each item's views. An item that lacks a view is left out.

    Shards may repeat a key. If one of the items with a key lacks a view, all of them are left out: which one it is, is
    unknown."""
    if len(views) == 1:
        return views[0]
    read = [Counter(one.keys) for one in views]
    unread = [Counter(out.key for out in one.left_out) for one in views]
    first = {out.key: out for one in reversed(views) for out in one.left_out}
    whole = {key for key, count in read[0].items() if key not in first and all(one[key] == count for one in read)}
    rows = [[row for row, key in enumerate(one.keys) if key in whole] for one in views]
    values = [F.normalize(one.values[own], dim=-1) for one, own in zip(views, rows, strict=True)]
    left_out: list[LeftOut] = []
    for key, out in first.items():
        left_out += [out] * max(some[key] + none[key] for some, none in zip(read, unread, strict=True))
    keys = [views[0].keys[row] for row in rows[0]]
    return Vectors(torch.stack(values).mean(0), keys, left_out, views[0].grids[rows[0]])
