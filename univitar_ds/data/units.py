"""How a group of shards of one modality is dealt out to lanes: pure functions of integers.

Every shard is cut into `parts` interleaved units; the units of an epoch are permuted and lane l takes those at
positions l, l + L, ... Each unit has one owner per epoch, so each sample is read once per epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from univitar_ds.randomness import permutation

PLENTY = 8
"""From this many shards a lane on, shards stay whole: lanes then differ by at most one unit in `PLENTY`."""


class Unit(NamedTuple):
    """The samples of a shard whose number within it leaves remainder `part` when divided by `parts`."""

    shard: int
    part: int
    parts: int


def parts_per_shard(shards: int, lanes: int) -> int:
    """How often each shard is cut so that every lane gets the same number of units, or nearly."""
    return 1 if shards >= PLENTY * lanes else lanes // math.gcd(shards, lanes)


def units_of_lane(
    shards: Sequence[int], lanes: int, lane: int, seed: int, modality: str, epoch: int, group: str = ""
) -> list[Unit]:
    """The units of one lane in one epoch of a group of shards, in reading order; `shards` are indices into the run's.

    `group` is the name of the group: each has an order of its own.
    """
    parts = parts_per_shard(len(shards), lanes)
    units = [Unit(shard, part, parts) for shard in shards for part in range(parts)]
    return [units[index] for index in permutation(len(units), seed, "units", modality, group, epoch)[lane::lanes]]
