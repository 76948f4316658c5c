"""Divides data without splits: some samples are held out for evaluation, and the others are trained on.

The side of a sample depends on a hash of its identity alone, so it is the same in every process and in a resumed run,
and other samples do not change it. A larger share holds out the samples of a smaller one and more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.captions import BYTES_LIMIT
from univitar_ds.errors import DataError
from univitar_ds.randomness import draw

REST, HELD_OUT = "train", "test"
"""Splits of divided data: the samples to train on, and those to evaluate on."""


@dataclass(frozen=True)
class HoldOut:
    """A part of a source. `share`: the share of the samples that is held out; `held_out`: whether these are read, or
    the others."""

    share: float
    held_out: bool

    def reads(self, stream: BinaryIO, path: str, group: tar_index.Group, *, packed: bool) -> bool:
        """Whether the part has a sample. Args: stream: of the shard at `path`; packed: whether `data pack` wrote it."""
        return (number_of(identity(stream, path, group, packed=packed)) < self.share) == self.held_out

    def expected(self, samples: int) -> int:
        """Returns about how many of `samples` samples the part has."""
        held_out = round(samples * self.share)
        return held_out if self.held_out else samples - held_out


def number_of(identity: str) -> float:
    """Returns a number in [0, 1) that depends on `identity` alone. The sample is held out if it is below the share."""
    return draw("hold_out", identity) / 2**64


def identity(stream: BinaryIO, path: str, group: tar_index.Group, *, packed: bool) -> str:
    """Returns the identity of a sample: the checksum of its media where `data pack` wrote it, so that equal files are
    in one part; else the names of its tar and its key."""
    if packed:
        with suppress(ValueError, RecursionError, KeyError, TypeError):
            return f"crc32 {_fields(stream, group)['crc32']:d}"
    return f"{os.path.basename(path)}/{group.key}"


def _fields(stream: BinaryIO, group: tar_index.Group) -> dict[str, int]:
    member = next((one for one in group.members if one.extension == "json" and one.length <= BYTES_LIMIT), None)
    if member is None:
        return {}
    if member.content is not None:
        return json.loads(member.content)
    stream.seek(member.offset)
    return json.loads(stream.read(member.length))


def check_splits(place: str, splits: Collection[str], wanted: str | None = None) -> None:
    """Checks that the samples of a source can be divided. Args: place: the source, in messages; splits: those that its
    samples have; wanted: the split to read, None if it is packed whole.

    Raises: DataError if the data have splits, or none of that name.
    """
    if len(splits) > 1 or HELD_OUT in splits:
        raise DataError(
            f"{place}: is divided already, into {', '.join(sorted(splits))}, and hold_out is for data without splits; "
            "leave it out, and evaluate on one of these splits"
        )
    if wanted is not None and wanted not in (HELD_OUT, *splits):
        raise DataError(
            f"{place}: has no split {wanted!r}; hold_out divides it into {', '.join([*splits, HELD_OUT])}: name one of "
            "these"
        )
