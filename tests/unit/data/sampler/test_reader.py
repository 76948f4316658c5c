"""The units of a lane and their order, and reading from any position on."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import counts, damaged, memory_shards, reader_of, small_config, wounds
from univitar_ds.data.loader import EvalShare, _sweep
from univitar_ds.data.sampler.cursor import ReadPosition
from univitar_ds.data.sampler.reader import Reader
from univitar_ds.data.sampler.shard_assignment import ShardSlice, _order, parts_per_shard, units_of_lane
from univitar_ds.data.shards.sources import groups_of


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_the_units_of_all_lanes_cover_every_part_of_every_shard_once(shards, lanes, seed, epoch):
    indices = [3 * index for index in range(shards)]
    lane_units = [units_of_lane(indices, lanes, lane, seed, "image", epoch) for lane in range(lanes)]
    parts = parts_per_shard(shards, lanes)
    assert sorted(unit for units in lane_units for unit in units) == [
        ShardSlice(s, p, parts) for s in indices for p in range(parts)
    ]
    sizes = [len(units) for units in lane_units]
    assert max(sizes) - min(sizes) <= (1 if min(sizes) >= 8 else 0)


@pytest.mark.parametrize(
    ("shards", "lanes", "parts"),
    [
        (1, 4, 4),
        (7, 4, 4),
        (6, 4, 2),
        (31, 4, 2),
        (32, 4, 1),
        (1243, 256, 2),
        (300, 256, 7),
        (16, 256, 16),
        (3, 256, 256),
    ],
)
def test_shards_are_divided_no_more_than_needed_for_lanes_of_similar_length(shards, lanes, parts):
    """Reading a part scans the whole shard: with 256 parts each, 1,243 shards would be scanned 256 times."""
    assert parts_per_shard(shards, lanes) == parts


def test_units_and_their_order_depend_on_epoch_seed_and_modality():
    first = units_of_lane(range(16), 2, 0, 0, "image", 0)
    assert first == units_of_lane(range(16), 2, 0, 0, "image", 0)
    others = [
        units_of_lane(range(16), 2, 0, 0, "image", 1),
        units_of_lane(range(16), 2, 0, 1, "image", 0),
        units_of_lane(range(16), 2, 0, 0, "video", 0),
    ]
    assert all(set(other) != set(first) for other in others)


def test_a_permutation_is_computed_once_for_all_lanes():
    """With few samples, lanes may be hundreds of epochs apart."""
    for epoch in range(200):
        units_of_lane(range(3), 4, 0, 0, "image", epoch, "drawn once")
    before = _order.cache_info().misses
    for epoch in range(200):
        units_of_lane(range(3), 4, 1, 0, "image", epoch, "drawn once")
    assert _order.cache_info().misses == before


def test_two_groups_with_the_same_number_of_shards_have_different_orders():
    shards = memory_shards([1] * 24, sources=["a"] * 12 + ["b"] * 12)
    config = small_config(shards)
    orders = {}
    for group in groups_of(shards, "image", {"a": 1, "b": 1}):
        reader = Reader(replace(config, weights={"a": 1, "b": 1}), group, 0, ReadPosition())
        orders[group.name] = [found.address.shard - group.shards[0] for found in iter(reader.next, None)]
    assert sorted(orders["a"]) == sorted(orders["b"]) == list(range(12))
    assert orders["a"] != orders["b"]


@settings(max_examples=30, deadline=None)
@given(counts, wounds, st.integers(1, 3))
def test_a_reader_continues_from_any_position_of_another_reader(sizes, wounds, lanes):
    config = small_config(damaged(sizes, wounds), lanes=lanes)
    reader = reader_of(config, lanes - 1)
    passed = [(reader.next(), reader.place) for _ in range(40)]
    for number, (_, place) in enumerate(passed[:-1]):
        again = reader_of(config, lanes - 1, place)
        assert again.next() == passed[number + 1][0]


def test_an_evaluation_prefetches_the_next_shards():
    config = small_config(memory_shards([2] * 5))
    for _ in _sweep(EvalShare(config.shards), config.size, 40, config.policy):
        pass
    hints = config.shards[0].storage.hints
    assert hints[:2] == [["m1", "m2", "m3", "m4"], ["m2", "m3", "m4"]]


def test_a_reader_prefetches_the_next_shards():
    config = small_config(memory_shards([2] * 9))
    reader = reader_of(config, 0)
    read = []
    while reader.place.epoch < 1:
        found = reader.next()
        if found is not None and (not read or read[-1] != f"m{found.address.shard}"):
            read.append(f"m{found.address.shard}")
    following = [f"m{unit.shard}" for unit in units_of_lane(range(9), 1, 0, 0, "image", 1)]
    assert len(set(read)) == 9
    hints = config.shards[0].storage.hints
    assert len(hints) >= 9
    for number, hint in enumerate(hints[:9]):
        expected = [name for name in (read + following)[number + 1 : number + 5] if name != read[number]]
        assert hint == list(dict.fromkeys(expected))
