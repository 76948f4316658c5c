"""Assigns the shards of a group to lanes: pure functions of integers.

Every shard is divided into `parts` interleaved units. The units of an epoch are permuted, and lane l of L gets the
units at positions l, l + L, ... Each unit belongs to one lane per epoch, so each sample is read once per epoch. Reading
a unit scans the whole shard, so shards are divided no more than needed for lanes of about equal length.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from univitar_ds.randomness import permutation

PLENTY = 8
"""Number of units per lane from which shards are not divided further. Lanes differ by at most one unit of this many."""
_ORDERS = 1024
"""Number of cached permutations, 4 bytes per unit. The lanes of a rank are in two epochs of a large group. In a group
with so few samples that many lanes get none, lanes may be hundreds of epochs apart, but such a group has few units."""


class ShardSlice(NamedTuple):
    """A unit: the samples of a shard whose number in the shard is `part` modulo `parts`."""

    shard: int
    part: int
    parts: int


def parts_per_shard(shards: int, lanes: int) -> int:
    """Returns the number of parts per shard with which the lanes get equal or nearly equal numbers of units."""
    if shards >= PLENTY * lanes:
        return 1
    return min(lanes // math.gcd(shards, lanes), math.ceil(PLENTY * lanes / shards))


def units_of_lane(
    shards: Sequence[int], lanes: int, lane: int, seed: int, modality: str, epoch: int, group: str = ""
) -> list[ShardSlice]:
    """Returns the units of one lane in one epoch of a group, in reading order. `shards`: indices of the run's shards.

    Groups with different names have different permutations.
    """
    parts = parts_per_shard(len(shards), lanes)
    own = _order(parts * len(shards), seed, modality, group, epoch)[lane::lanes]
    return [ShardSlice(shards[index // parts], index % parts, parts) for index in own]


@lru_cache(_ORDERS)
def _order(units: int, seed: int, modality: str, group: str, epoch: int) -> array[int]:
    """Returns the permutation for all lanes, cached, because 100,000 units take a third of a second."""
    return array("I", permutation(units, seed, "units", modality, group, epoch))
