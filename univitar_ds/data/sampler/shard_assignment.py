"""How a group of shards of one modality is dealt out to lanes: pure functions of integers.

Every shard is cut into `parts` interleaved units; the units of an epoch are permuted and lane l takes those at
positions l, l + L, ... Each unit has one owner per epoch, so each sample is read once per epoch. Who reads a part goes
over the whole shard for it, so shards are cut as little as lanes of about the same length allow.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from univitar_ds.randomness import permutation

PLENTY = 8
"""With this many units a lane, nothing is cut further: lanes then differ by at most one unit in `PLENTY`."""
_ORDERS = 1024
"""Orders that are kept, 4 bytes a unit. Lanes of a rank are in two epochs of a large group, but in hundreds of a group
of which many lanes find nothing in an epoch; that one has few units."""


class ShardSlice(NamedTuple):
    """The samples of a shard whose number within it leaves remainder `part` when divided by `parts`."""

    shard: int
    part: int
    parts: int


def parts_per_shard(shards: int, lanes: int) -> int:
    """Into how many parts each shard is cut so that every lane gets the same number of units, or nearly."""
    if shards >= PLENTY * lanes:
        return 1
    return min(lanes // math.gcd(shards, lanes), math.ceil(PLENTY * lanes / shards))


def units_of_lane(
    shards: Sequence[int], lanes: int, lane: int, seed: int, modality: str, epoch: int, group: str = ""
) -> list[ShardSlice]:
    """The units of one lane in one epoch of a group of shards, in reading order; `shards` are indices into the run's.

    `group` is the name of the group: each has an order of its own.
    """
    parts = parts_per_shard(len(shards), lanes)
    own = _order(parts * len(shards), seed, modality, group, epoch)[lane::lanes]
    return [ShardSlice(shards[index // parts], index % parts, parts) for index in own]


@lru_cache(_ORDERS)
def _order(units: int, seed: int, modality: str, group: str, epoch: int) -> array[int]:
    """Drawn once for all lanes: of a hundred thousand units it takes a third of a second."""
    return array("I", permutation(units, seed, "units", modality, group, epoch))
