"""Which samples a lane gives: all of them once an epoch, the same from any save point on, whoever runs it."""

import json
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import memory_shards, shards_of, sized_sample, small_rules, tiny_picture
from univitar_ds.data.cursor import LaneCursor, StreamCursor, parse
from univitar_ds.data.lanes import Lane, Stream
from univitar_ds.data.sources import fingerprint
from univitar_ds.data.units import Unit, parts_per_shard, units_of_lane
from univitar_ds.errors import DataError

counts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda some: sum(some) > 0)


def keys(items):
    return [item.sample.key for item in items]


def packs_of(rules, lane, n, start=None):
    stream = Stream(rules, lane, start or StreamCursor())
    return [stream.next_pack() for _ in range(n)], stream.cursor()


@given(st.integers(1, 40), st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_the_units_of_all_lanes_are_every_part_of_every_shard_once(shards, lanes, seed, epoch):
    indices = [3 * index for index in range(shards)]
    dealt = [units_of_lane(indices, lanes, lane, seed, "image", epoch) for lane in range(lanes)]
    parts = parts_per_shard(shards, lanes)
    assert sorted(unit for units in dealt for unit in units) == [
        Unit(s, p, parts) for s in indices for p in range(parts)
    ]
    sizes = [len(units) for units in dealt]
    assert max(sizes) - min(sizes) <= (1 if shards >= 8 * lanes else 0)


def test_units_change_their_order_and_owner_from_epoch_to_epoch_and_seed_to_seed():
    first = units_of_lane(range(16), 2, 0, 0, "image", 0)
    assert first == units_of_lane(range(16), 2, 0, 0, "image", 0)
    others = [
        units_of_lane(range(16), 2, 0, 0, "image", 1),
        units_of_lane(range(16), 2, 0, 1, "image", 0),
        units_of_lane(range(16), 2, 0, 0, "video", 0),
    ]
    assert all(set(other) != set(first) for other in others)


def drained(rules, lane, epochs):
    """(key, epoch) of every item until the lane has nothing left of its first epochs."""
    stream = Stream(rules, lane, StreamCursor())
    given_out = []
    while stream.cursor().epoch < epochs or any(row.epoch < epochs for row in stream.cursor().pool):
        items, _ = stream.next_pack()
        assert len(set(keys(items))) == len(items), "a pack holds a sample twice"
        waiting = [row.epoch for row in stream.cursor().pool]
        assert max(waiting, default=0) - min(waiting, default=0) <= 1, "the pool holds more than two epochs"
        given_out += [(item.sample.key, item.address.epoch) for item in items]
    return given_out


@settings(max_examples=30, deadline=None)
@given(counts, st.integers(1, 4), st.integers(0, 3))
def test_every_sample_leaves_once_per_epoch_over_all_lanes(sizes, lanes, seed):
    rules = small_rules(memory_shards(sizes), lanes=lanes, seed=seed)
    seen = Counter(entry for lane in range(lanes) for entry in drained(rules, lane, 3) if entry[1] < 3)
    everything = [f"{shard}-{index}" for shard, count in enumerate(sizes) for index in range(count)]
    assert seen == Counter({(key, epoch): 1 for key in everything for epoch in range(3)})


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 3), st.integers(0, 30), st.integers(1, 10))
def test_from_any_save_point_the_same_packs_follow(sizes, lanes, before, after):
    rules = small_rules(memory_shards(sizes, captions=3), lanes=lanes)
    lane = lanes - 1
    stream = Stream(rules, lane, StreamCursor())
    for _ in range(before):
        stream.next_pack()
    saved = LaneCursor(lane, lanes, 0, "f", before, {"image": stream.cursor()})
    loaded = parse(json.loads(json.dumps(saved.to_json())))
    assert loaded == saved
    whole = [stream.next_pack() for _ in range(after)]
    resumed, end = packs_of(rules, lane, after, loaded.streams["image"])
    assert resumed == whole
    assert end == stream.cursor()


def test_resuming_reads_the_pool_by_address_and_replays_nothing():
    shards = memory_shards([400])
    storage = shards[0].storage
    rules = small_rules(shards)
    stream = Stream(rules, 0, StreamCursor())
    for _ in range(60):
        stream.next_pack()
    cursor = stream.cursor()
    storage.ranges_read = 0
    Stream(rules, 0, cursor)
    assert storage.ranges_read == len(cursor.pool) < 20


def test_a_lane_does_not_know_how_many_lanes_a_rank_runs():
    """Two ranks with two lanes each give what one rank with four gives."""
    shards = memory_shards([30, 30])
    rules = {"image": small_rules(shards, lanes=4)}

    def run(owned):
        lanes = [Lane(rules, LaneCursor(lane, 4, 0, "f")) for lane in owned]
        plans = [lane.next_plan("image", step) for step in range(8) for lane in lanes]
        return {(plan.index, plan.lane): (keys(plan.items), plan.cursor) for plan in plans}

    assert run([0, 1, 2, 3]) == run([0, 1]) | run([2, 3])


def test_each_modality_of_a_lane_goes_on_where_it_was():
    """Whatever lies between two packs of pictures, they are the same; and the cursor keeps both streams."""
    shards = memory_shards([40], modality=None)
    rules = small_rules(shards)
    alone = packs_of(rules, 0, 4)[0]
    videos = small_rules(memory_shards([40]), seed=9)  # stands in for a second, independent stream
    lane = Lane({"image": rules, "video": videos}, LaneCursor(0, 1, 0, "f"))
    mixed = [lane.next_plan(modality, n) for n, modality in enumerate(["image", "video", "video", "image", "image"])]
    assert [(list(p.items), p.bad) for p in mixed if p.modality == "image"] == alone[:3]
    cursor = mixed[-1].cursor
    assert (cursor.packs, cursor.streams["image"].packs, cursor.streams["video"].packs) == (5, 3, 2)
    resumed = Lane({"image": rules, "video": videos}, parse(json.loads(json.dumps(cursor.to_json()))))
    assert resumed.next_plan("image", 5) == lane.next_plan("image", 5)
    assert resumed.next_plan("video", 6) == lane.next_plan("video", 6)


def test_packs_mix_samples_that_lie_far_apart():
    rules = small_rules(memory_shards([300]), pool_samples=64)
    packs, _ = packs_of(rules, 0, 20)
    spans = [max(i.address.ordinal for i in items) - min(i.address.ordinal for i in items) for items, _ in packs]
    assert sum(spans) / len(spans) > 30
    ordinals = [[item.address.ordinal for item in items] for items, _ in packs]
    together = sum(ordinal + 1 in pack for pack in ordinals for ordinal in pack)
    assert together < 0.3 * sum(map(len, ordinals))


def test_no_sample_waits_longer_than_the_pool_is_deep():
    rules = small_rules(memory_shards([40] * 10))
    packs, _ = packs_of(rules, 0, 300)
    assert max(item.address.waited for items, _ in packs for item in items) < rules.pool_samples + 8


def test_the_pool_grows_past_its_number_where_items_are_small():
    shards = shards_of([[(f"k{n}", {"png": tiny_picture(14, 14), "txt": b"one token"}) for n in range(300)]])
    packs, _ = packs_of(small_rules(shards, pool_samples=4), 0, 5)
    assert [len(items) for items, _ in packs] == [40] * 5


def test_packs_stay_full_across_the_end_of_an_epoch():
    rules = small_rules(memory_shards([60]), pool_samples=32)
    packs, end = packs_of(rules, 0, 60)
    assert end.epoch >= 3
    fills = [sum(item.sample.tokens for item in items) / 40 for items, _ in packs]
    assert min(fills) >= 0.95


def test_the_caption_of_an_epoch_is_drawn_and_stays_the_same_on_a_rerun():
    rules = small_rules(memory_shards([8], captions=4))
    chosen = [{i.sample.key: i.caption for i in items} for items, _ in packs_of(rules, 0, 40)[0]]
    assert chosen == [{i.sample.key: i.caption for i in items} for items, _ in packs_of(rules, 0, 40)[0]]
    assert len({caption for pack in chosen for caption in pack.values()}) == 8 * 4


def test_mixed_shards_give_each_stream_its_own_samples():
    mixed = [
        sized_sample("a", 0),
        ("b", {"mp4": b"no clip", "txt": b"t"}),
        ("c", {"txt": b"nothing to see"}),
        sized_sample("d", 1),
    ]
    packs, _ = packs_of(small_rules(shards_of([mixed], modality=None)), 0, 1)
    items, bad = packs[0]
    assert {"a", "d"} == set(keys(items))
    assert set(bad) == {"no_media"}  # counted once by the pictures' stream; the clip is not its business
    with pytest.raises(
        DataError, match=r"none of the 1 shards has a readable video sample \(left out: \d+ unreadable\)"
    ):
        packs_of(small_rules(shards_of([mixed], modality=None), modality="video", frames=2), 0, 1)


def test_a_bad_sample_is_counted_by_kind_and_logged_with_shard_key_and_byte(caplog):
    samples = [sized_sample(f"g{n}", n) for n in range(30)]
    samples[3:3] = [
        ("x", {"png": tiny_picture(20, 20)}),
        ("y", {"png": b"junk", "txt": b"t"}),
        ("z", {"png": tiny_picture(20, 20), "json": b"{"}),
    ]
    with caplog.at_level(logging.WARNING):
        packs, _ = packs_of(small_rules(shards_of([samples])), 0, 1)
    assert packs[0][1] == {"no_caption": 1, "unreadable": 1, "bad_json": 1}
    assert "sample left out (no_caption): m0/x at byte 6144" in caplog.text


def test_too_many_bad_samples_in_a_row_end_the_run():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(6)]
    told = r"shard m0: 6 samples in a row cannot be used \(data.max_bad_in_a_row is 5\); the last one: the bytes"
    with pytest.raises(DataError, match=told):
        packs_of(small_rules(shards_of([samples])), 0, 30)


def test_as_many_bad_samples_in_a_row_as_allowed_are_passed_over():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(5)]
    packs, _ = packs_of(small_rules(shards_of([samples])), 0, 30)
    assert sum(sum(bad.values()) for _, bad in packs) >= 5


def test_data_without_a_readable_sample_is_an_error_and_no_endless_loop():
    for contents in ([[], []], [[("x", {"png": b"junk", "txt": b"t"})], []]):
        with pytest.raises(DataError, match="none of the 2 shards has a readable image sample"):
            packs_of(small_rules(shards_of(contents)), 0, 1)


def test_a_lane_without_a_sample_in_one_epoch_waits_for_the_next():
    rules = small_rules(memory_shards([1]), lanes=4)
    for lane in range(4):
        packs, end = packs_of(rules, lane, 2)
        assert [keys(items) for items, _ in packs] == [["0-0"], ["0-0"]]
        assert end.epoch >= 1


def test_a_pool_that_the_next_stage_does_not_allow_is_left_out_and_counted():
    shards = memory_shards([60])
    _, cursor = packs_of(small_rules(shards), 0, 3)
    rules = small_rules(shards)
    tighter = replace(rules, size=replace(rules.size, most_tokens=10), max_bad_in_a_row=60)
    ((items, bad),), _ = packs_of(tighter, 0, 1, cursor)
    too_large = [row for row in cursor.pool if 1 + row.ordinal % 5 > 2 and row.ordinal // 5 % 4 == 3]
    assert bad["too_large"] >= len(too_large) > 0
    assert max(item.sample.tokens for item in items) <= 10


def test_a_cursor_of_changed_data_is_refused():
    shards = memory_shards([20, 20])
    rules = small_rules(shards)
    _, cursor = packs_of(rules, 0, 3)
    other = shards_of([[(f"other{n}", sized_sample("k", n)[1]) for n in range(3)]])
    with pytest.raises(DataError, match="the sample that the data cursor has at byte"):
        Stream(small_rules([other[0], other[0]]), 0, cursor)
    saved = LaneCursor(0, 1, 0, fingerprint(shards))
    with pytest.raises(
        DataError, match=r"sources have changed since the data cursor was saved .*restore the same shards"
    ):
        saved.expect(lane=0, lanes=1, seed=0, fingerprint=fingerprint(other))


@pytest.mark.parametrize(
    ("name", "given"), [("data.lanes", {"lanes": 8}), ("seed", {"seed": 1}), ("lane", {"lane": 1})]
)
def test_a_cursor_of_another_run_is_refused_by_the_name_of_what_differs(name, given):
    expected = {"lane": 0, "lanes": 4, "seed": 0, "fingerprint": "f", **given}
    with pytest.raises(DataError, match=rf"the saved data cursor has {name} \d, this run \d; resume with \d"):
        LaneCursor(0, 4, 0, "f").expect(**expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 7}, "has version 7"),
        ({"packs": -1}, "is damaged"),
        ({"packs": True}, "is damaged"),
        ({"image": {"epoch": "x", "pool": []}}, "is damaged"),
        ({"image": {"epoch": 0, "pool": [[1, 2]]}}, "is damaged"),
        ({"image": {"epok": 0, "pool": []}}, "is damaged"),
    ],
)
def test_a_damaged_cursor_is_refused(change, said):
    with pytest.raises(DataError, match=said):
        parse({**LaneCursor(0, 4, 0, "f").to_json(), **change})
    with pytest.raises(DataError, match="has version None"):
        parse([])


def test_the_order_does_not_hang_on_the_process():
    """Another interpreter with another hash seed draws the same."""
    code = (
        "from tests.support.memory import *; from univitar_ds.data.lanes import *;"
        "s = Stream(small_rules(memory_shards([30, 9]), lanes=3), 1, StreamCursor());"
        "print([[i.sample.key for i in s.next_pack()[0]] for _ in range(9)])"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])}
    there = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    here = packs_of(small_rules(memory_shards([30, 9]), lanes=3), 1, 9)[0]
    assert there.stdout.strip() == str([keys(items) for items, _ in here])
