"""Lanes that read parts of a shard share one scan, and each gets the same entries as from a scan of its own."""

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
    """A list whose only element is the number of reads from the shard's streams from now on."""
    reads = [0]
    shard.storage.open = lambda path: Counted(shard.storage.files[path], reads)
    return reads


def alone(shard, part, parts):
    """The entries of a part of a shard, by a scan of the whole shard."""
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
def test_the_entries_of_a_part_do_not_depend_on_the_readers_of_other_parts(contents, parts, most_kept, data):
    shards = raw_shards([wounded(*content) for content in contents])
    index_cache = IndexCache(most_kept)
    waiting = [(shard, part) for shard in shards for part in range(parts)] * 2
    running, found = [], []
    while waiting or running:
        if waiting and (not running or data.draw(st.booleans())):
            shard, part = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            found.append((shard, part, []))
            running.append((index_cache.part(shard, "image", part, parts), found[-1][2]))
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
    index_cache = IndexCache()
    for part in range(8):
        list(index_cache.part(shard, "image", part, 8))
    assert reads[0] < 2 * once  # samples in the index are read once more at their offset
    reads[0] = 0
    list(index_cache.part(shard, "image", 3, 8))
    assert reads[0] <= once / 8


def test_the_first_sample_is_yielded_before_the_rest_is_scanned():
    (shard,) = memory_shards([100])
    reads = counted(shard)
    next(IndexCache().part(shard, "image", 0, 4))
    assert reads[0] < 8


def test_a_dropped_index_is_scanned_again():
    shards = memory_shards([20, 20])
    index_cache = IndexCache(most_kept=10)
    list(index_cache.part(shards[0], "image", 0, 2))
    list(index_cache.part(shards[1], "image", 0, 2))
    reads = counted(shards[0])
    list(index_cache.part(shards[0], "image", 1, 2))
    assert reads[0] > 40


def test_the_error_for_a_replaced_shard_names_the_byte():
    (shard,) = memory_shards([20])
    index_cache = IndexCache()
    list(index_cache.part(shard, "image", 0, 2))
    content = shard.storage.files[shard.path]
    _, (second, _) = alone(shard, 1, 2)[:2]
    begin = second.offset
    shard.storage.files[shard.path] = content[:begin] + bytes(512) + content[begin + 512 :]
    with pytest.raises(DataError, match=f"shard m0: the sample at byte {begin} is not there any more"):
        list(index_cache.part(shard, "image", 1, 2))


def test_a_read_error_is_raised_for_all_parts_and_not_treated_as_the_end_of_the_shard():
    (shard,) = memory_shards([20])
    whole = shard.storage.open

    class Failing(io.BytesIO):
        def read(self, *size):
            if self.tell() > shard.size // 2:
                raise DataError("the store is gone")
            return super().read(*size)

    shard.storage.open = lambda path: Failing(shard.storage.files[path])
    index_cache = IndexCache()
    other = index_cache.part(shard, "image", 1, 2)
    next(other)
    with pytest.raises(DataError, match="the store is gone"):
        list(index_cache.part(shard, "image", 0, 2))
    with pytest.raises(DataError, match="the store is gone"):
        list(other)
    shard.storage.open = whole
    assert list(index_cache.part(shard, "image", 0, 2)) == alone(shard, 0, 2)


def test_damage_belongs_to_the_part_of_the_sample_that_follows():
    (whole,) = memory_shards([9])
    at = [(entry.offset + 1) / whole.size for entry in shard_samples(whole, "image")]
    (shard,) = raw_shards([wounded(9, [at[2], at[7]])])
    index_cache = IndexCache()
    damage = {
        part: [n for e, n in index_cache.part(shard, "image", part, 3) if isinstance(e, Damage)] for part in range(3)
    }
    assert damage == {0: [], 1: [7], 2: [2]}  # the remaining members of those samples still count as one sample each


def test_a_shard_with_fewer_samples_than_in_its_manifest_is_damaged_at_its_end():
    (shard,) = memory_shards([5])
    short = replace(shard, samples=8)
    *groups, damage = shard_samples(short, "image")
    assert len(groups) == 5
    assert (damage.kind, damage.offset, damage.end) == ("cut", shard.size, shard.size)
    assert "ends after 5 samples, its manifest says 8" in damage.message
    assert list(shard_samples(short, "image", groups[1].end, 2)) == [*groups[2:], damage]
    assert list(shard_samples(replace(shard, samples=5), "image")) == groups
    index_cache = IndexCache()
    reported = [entry for part in range(3) for entry, _ in index_cache.part(short, "image", part, 3) if entry == damage]
    assert reported == [damage]


def test_damage_at_the_end_of_a_shard_is_reported_once():
    (shard,) = memory_shards([5])
    half = shard.size // 2
    shard.storage.files[shard.path] = shard.storage.files[shard.path][:half]
    found = list(shard_samples(replace(shard, size=half, samples=5), "image"))
    assert [entry.kind for entry in found if isinstance(entry, Damage)] == ["cut"]
