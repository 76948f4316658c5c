"""Lanes that share a shard share its scan, and each still gets what it would find alone."""

import io
from dataclasses import replace
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import memory_shards, raw_shards, sized_sample, tar_bytes
from univitar_ds.data.shards.index_cache import IndexCache, shard_samples
from univitar_ds.data.shards.tar_index import Damage, Group
from univitar_ds.errors import DataError


class Counted(io.BytesIO):
    """Counts its reads in `reads[0]`."""

    def __init__(self, content, reads):
        super().__init__(content)
        self._reads = reads

    def read(self, *size):
        self._reads[0] += 1
        return super().read(*size)


def counted(shard):
    """The number of reads from the shard's streams from now on, in a list."""
    reads = [0]
    shard.storage.open = lambda path: Counted(shard.storage.files[path], reads)
    return reads


def alone(shard, part, parts):
    """What a part of a shard holds, by a scan of all of it."""
    owned, number = [], 0
    for entry in shard_samples(shard, "image"):
        if number % parts == part:
            owned.append((entry, number))
        number += isinstance(entry, Group)
    return owned


def wounded(n, wounds):
    """A shard of `n` samples in which the blocks at these shares of its bytes are zero."""
    content = tar_bytes([sized_sample(str(i), i) for i in range(n)])
    for share in wounds:
        at = int(share * len(content)) // 512 * 512
        content = content[:at] + bytes(512) + content[at + 512 :]
    return content


shares = st.lists(st.floats(0, 0.99), max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), shares), min_size=1, max_size=3),
    st.integers(1, 4),
    st.sampled_from([0, 5, 1000]),
    st.data(),
)
def test_a_part_is_the_same_whoever_reads_the_others_and_whenever(contents, parts, most_kept, data):
    shards = raw_shards([wounded(*content) for content in contents])
    scans = IndexCache(most_kept)
    waiting = [(shard, part) for shard in shards for part in range(parts)] * 2
    running, found = [], []
    while waiting or running:
        if waiting and (not running or data.draw(st.booleans())):
            shard, part = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            found.append((shard, part, []))
            running.append((scans.part(shard, "image", part, parts), found[-1][2]))
        entries, got = running[data.draw(st.integers(0, len(running) - 1))]
        more = list(islice(entries, 2))
        got += more
        if not more:
            running.remove((entries, got))
    for shard, part, got in found:
        assert got == alone(shard, part, parts)


def test_a_shard_is_scanned_once_for_all_its_parts():
    (shard,) = memory_shards([48])
    reads = counted(shard)
    list(shard_samples(shard, "image"))
    once, reads[0] = reads[0], 0
    scans = IndexCache()
    for part in range(8):
        list(scans.part(shard, "image", part, 8))
    assert reads[0] < 2 * once  # every part but the first of a sample's readers reads its own headers again
    reads[0] = 0
    list(scans.part(shard, "image", 3, 8))
    assert reads[0] <= once / 8


def test_the_first_sample_comes_before_the_rest_is_scanned():
    (shard,) = memory_shards([100])
    reads = counted(shard)
    next(IndexCache().part(shard, "image", 0, 4))
    assert reads[0] < 8


def test_a_scan_that_is_let_go_is_done_again():
    shards = memory_shards([20, 20])
    scans = IndexCache(most_kept=10)
    list(scans.part(shards[0], "image", 0, 2))
    list(scans.part(shards[1], "image", 0, 2))
    reads = counted(shards[0])
    list(scans.part(shards[0], "image", 1, 2))
    assert reads[0] > 40


def test_a_shard_that_was_replaced_is_refused_with_its_byte():
    (shard,) = memory_shards([20])
    scans = IndexCache()
    list(scans.part(shard, "image", 0, 2))
    content = shard.storage.files[shard.path]
    _, (second, _) = alone(shard, 1, 2)[:2]
    begin = second.offset
    shard.storage.files[shard.path] = content[:begin] + bytes(512) + content[begin + 512 :]
    with pytest.raises(DataError, match=f"shard m0: the sample at byte {begin} is not there any more"):
        list(scans.part(shard, "image", 1, 2))


def test_a_shard_that_could_not_be_read_is_not_taken_for_a_short_one():
    (shard,) = memory_shards([20])
    whole = shard.storage.open

    class Failing(io.BytesIO):
        def read(self, *size):
            if self.tell() > shard.size // 2:
                raise DataError("the store is gone")
            return super().read(*size)

    shard.storage.open = lambda path: Failing(shard.storage.files[path])
    scans = IndexCache()
    other = scans.part(shard, "image", 1, 2)
    next(other)
    with pytest.raises(DataError, match="the store is gone"):
        list(scans.part(shard, "image", 0, 2))
    with pytest.raises(DataError, match="the store is gone"):
        list(other)
    shard.storage.open = whole
    assert list(scans.part(shard, "image", 0, 2)) == alone(shard, 0, 2)


def test_damage_belongs_to_the_part_of_the_sample_that_follows():
    (whole,) = memory_shards([9])
    at = [(entry.offset + 1) / whole.size for entry in shard_samples(whole, "image")]
    (shard,) = raw_shards([wounded(9, [at[2], at[7]])])
    scans = IndexCache()
    reported = {part: [n for e, n in scans.part(shard, "image", part, 3) if isinstance(e, Damage)] for part in range(3)}
    assert reported == {0: [], 1: [7], 2: [2]}  # what is left of those samples still counts as one each


def test_a_shard_with_fewer_samples_than_its_manifest_says_is_damaged_at_its_end():
    (shard,) = memory_shards([5])
    short = replace(shard, samples=8)
    *groups, damage = shard_samples(short, "image")
    assert len(groups) == 5
    assert (damage.kind, damage.offset, damage.end) == ("cut", shard.size, shard.size)
    assert "ends after 5 samples, its manifest says 8" in damage.message
    assert list(shard_samples(short, "image", groups[1].end, 2)) == [*groups[2:], damage]
    assert list(shard_samples(replace(shard, samples=5), "image")) == groups
    scans = IndexCache()
    reported = [entry for part in range(3) for entry, _ in scans.part(short, "image", part, 3) if entry == damage]
    assert reported == [damage]


def test_a_shard_that_is_damaged_to_its_end_is_reported_once():
    (shard,) = memory_shards([5])
    half = shard.size // 2
    shard.storage.files[shard.path] = shard.storage.files[shard.path][:half]
    found = list(shard_samples(replace(shard, size=half, samples=5), "image"))
    assert [entry.kind for entry in found if isinstance(entry, Damage)] == ["cut"]
