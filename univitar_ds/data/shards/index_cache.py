"""Finds the samples of a shard by scanning. Lanes that read parts of the same shard share one scan per process."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO

from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import belongs, is_read
from univitar_ds.errors import DataError
from univitar_ds.geometry import Modality

MAX_KEPT = 1 << 19
"""Maximum number of samples whose offsets are kept, at 8 bytes each."""

Entry = tar_index.Group | tar_index.Damage


def shard_samples(shard: Shard, modality: Modality, offset: int = 0, number: int = 0) -> Iterator[Entry]:
    """Yields the samples of a modality in a shard, in order, and the damage between them.

    A shard with fewer samples than its manifest lists yields damage at its end, unless the last damage reaches it.
    Args: offset: the byte to start at; number: the number of the next sample.
    Raises: DataError if the shard cannot be read.
    """
    damaged_end = False
    with shard.storage.open(shard.path) as stream:
        for found in tar_index.scan(stream, shard.name, shard.size, offset):
            if isinstance(found, tar_index.Damage):
                damaged_end = found.end >= shard.size
                yield found
            elif belongs(found, shard, modality):
                number += 1
                if is_read(stream, shard, found):
                    yield found
    counted = shard.hold_out is None or offset == 0  # else `number` has only the samples of a part
    if counted and shard.samples is not None and number < shard.samples and not damaged_end:
        message = (
            f"shard {shard.name}: ends after {number} samples, its manifest says {shard.samples}; "
            "restore the shard or pack it again"
        )
        yield tar_index.Damage("cut", shard.size, shard.size, message)


class IndexCache:
    """A cache of shard indexes, scanned as far as needed. Drops the least recently used indexes. Not thread-safe."""

    def __init__(self, most_kept: int = MAX_KEPT) -> None:
        self._most_kept = most_kept
        self._scans: OrderedDict[tuple[Any, ...], _Scan] = OrderedDict()

    def part(self, shard: Shard, modality: Modality, part: int, parts: int) -> Iterator[tuple[Entry, int]]:
        """Yields every `parts`-th sample of `shard_samples` from number `part` on, and the damage before each.

        Each entry comes with its number; damage with that of the next sample. An indexed sample is read at its
        offset without scanning the samples before it.
        Raises: DataError if the shard cannot be read or was replaced.
        """
        scan = self._of(shard, modality)
        with shard.storage.open(shard.path) as stream:
            yield from scan.part(stream, part, parts)

    def _of(self, shard: Shard, modality: Modality) -> _Scan:
        key = shard.path, shard.modality, shard.samples, shard.hold_out, modality  # all that determines the result
        scan = self._scans.get(key)
        if scan is None or scan.failure is not None:
            scan = self._scans[key] = _Scan(shard, modality)
        self._scans.move_to_end(key)
        kept = sum(map(len, self._scans.values()))
        while kept > self._most_kept and len(self._scans) > 1:
            _, oldest = self._scans.popitem(last=False)
            kept -= len(oldest)
        return scan


class _Scan:
    """Index of the scanned part of a shard. Offsets are in blocks, so that 4 bytes are enough for 2 TiB."""

    def __init__(self, shard: Shard, modality: Modality) -> None:
        self.failure: Exception | None = None
        self._shard = shard
        self._coming = shard_samples(shard, modality)
        self._begins, self._ends = array("I"), array("I")
        self._damage: dict[int, list[tar_index.Damage]] = {}
        """Damage by the number of the sample that follows."""

    def __len__(self) -> int:
        return len(self._begins)

    def part(self, stream: BinaryIO, part: int, parts: int) -> Iterator[tuple[Entry, int]]:
        """See `IndexCache.part`. `stream`: a stream of the shard."""
        number = part
        while True:
            found = self._group(stream, number) if number < len(self) else self._scan_to(number)
            for damage in self._damage.get(number, ()):
                yield damage, number
            if found is None:
                return
            yield found, number
            number += parts

    def _scan_to(self, number: int) -> tar_index.Group | None:
        """Continues the scan to the sample with this number; None if the shard has fewer samples."""
        if self.failure is not None:  # returning None would look like the end of the shard
            raise self.failure
        try:
            for found in self._coming:
                if isinstance(found, tar_index.Damage):
                    self._damage.setdefault(len(self), []).append(found)
                    continue
                self._begins.append(found.offset // tar_index.BLOCK)
                self._ends.append(found.end // tar_index.BLOCK)
                if len(self) > number:
                    return found
        except Exception as error:
            self.failure = error
            raise
        return None

    def _group(self, stream: BinaryIO, number: int) -> tar_index.Group:
        begin, end = self._begins[number] * tar_index.BLOCK, self._ends[number] * tar_index.BLOCK
        found = tar_index.group_between(stream, self._shard.name, begin, end)
        if found is None:
            raise DataError(
                f"shard {self._shard.name}: the sample at byte {begin} is not there any more; the shard was replaced "
                "during this run: restore the shard that this run was started with, or start a new run"
            )
        return found
