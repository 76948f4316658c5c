"""Which samples a lane gives: all of them once an epoch, the same from any save point on, whoever runs it."""

import json
import logging
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import (
    memory_shards,
    raw_shards,
    shards_of,
    sized_sample,
    small_rules,
    tar_bytes,
    tiny_picture,
)
from univitar_ds.data.cursor import LaneCursor, Place, StreamCursor, parse
from univitar_ds.data.health import BadPolicy
from univitar_ds.data.lanes import Lane, Stream
from univitar_ds.data.reading import Reader, read_entry
from univitar_ds.data.scans import Scans, shard_samples
from univitar_ds.data.sources import EVERYTHING, groups_of
from univitar_ds.data.tar import Damage
from univitar_ds.data.units import Unit, parts_per_shard, units_of_lane
from univitar_ds.errors import DataError, SampleError

START = Place()
counts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda some: sum(some) > 0)


def keys(items):
    return [item.sample.key for item in items]


def epoch_of(cursor):
    return cursor.places[EVERYTHING].epoch


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


def test_two_groups_of_the_same_number_of_shards_are_read_in_orders_of_their_own():
    shards = memory_shards([1] * 24, sources=["a"] * 12 + ["b"] * 12)
    orders = {}
    for group in groups_of(shards, "image", {"a": 1, "b": 1}):
        reader = Reader(shards, group, "image", lanes=1, lane=0, seed=0, place=START)
        orders[group.name] = [found.shard - group.shards[0] for found in iter(reader.next, None)]
    assert sorted(orders["a"]) == sorted(orders["b"]) == list(range(12))
    assert orders["a"] != orders["b"]


def drained(rules, lane, epochs):
    """(key, epoch) of every item until the lane has nothing left of its first epochs."""
    stream = Stream(rules, lane, StreamCursor())
    given_out = []
    while epoch_of(stream.cursor()) < epochs or any(row.epoch < epochs for row in stream.cursor().pool):
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
        scans = Scans()
        lanes = [Lane(rules, LaneCursor(lane, 4, 0, "f"), scans) for lane in owned]
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
    waits = [left - item.address.since for left, (items, _) in enumerate(packs) for item in items]
    assert 3 < max(waits) < rules.pool_samples + 8


@pytest.mark.parametrize("pool_samples", [16, 32, 64])
def test_samples_wait_about_equally_long_and_not_as_chance_has_it(pool_samples):
    """Were all as likely to leave each time, waits would spread about as much as their mean."""
    packs, _ = packs_of(small_rules(memory_shards([40] * 10), pool_samples=pool_samples), 0, 250)
    waits = [left - item.address.since for left, (items, _) in enumerate(packs) for item in items]
    assert statistics.pstdev(waits) <= 0.6 * statistics.fmean(waits)


def test_the_pool_grows_past_its_number_where_items_are_small():
    shards = shards_of([[(f"k{n}", {"png": tiny_picture(14, 14), "txt": b"one token"}) for n in range(300)]])
    packs, _ = packs_of(small_rules(shards, pool_samples=4), 0, 5)
    assert [len(items) for items, _ in packs] == [40] * 5


def test_packs_stay_full_across_the_end_of_an_epoch():
    rules = small_rules(memory_shards([60]), pool_samples=32)
    packs, end = packs_of(rules, 0, 60)
    assert epoch_of(end) >= 3
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
    with pytest.raises(DataError, match=r"none of the 1 shards has a readable video sample \(left out: 1 unreadable\)"):
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
    assert "sample left out (no_caption, number 1 of lane 0, image): m0/x at byte 6144: neither" in caplog.text


def test_too_many_bad_samples_in_a_row_end_the_run():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(6)]
    told = r"lane 0, image: 6 samples in a row cannot be used \(data.max_bad_in_a_row is 5\).*: m0/x5 at byte \d+: the"
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
        assert epoch_of(end) >= 1


def test_a_pool_that_the_next_stage_does_not_allow_is_left_out_and_counted():
    shards = memory_shards([60])
    _, cursor = packs_of(small_rules(shards), 0, 3)
    rules = small_rules(shards)
    tighter = replace(rules, size=replace(rules.size, max_image_px=10 * 196), policy=BadPolicy("skip", 1000, 60))
    ((items, bad),), after = packs_of(tighter, 0, 1, cursor)
    too_large = [row for row in cursor.pool if (1 + row.ordinal % 5) * (1 + row.ordinal // 5 % 4) > 10]
    assert bad["too_large"] >= len(too_large) > 0
    assert max(item.sample.tokens for item in items) <= 10
    assert after.reading[1] == bad["too_large"] - len(too_large), "the stage's choice counts as bad data"


def test_a_pool_whose_addresses_hold_something_else_is_refused():
    _, cursor = packs_of(small_rules(memory_shards([20, 20])), 0, 3)
    other = shards_of([[(f"other{n}", sized_sample("k", n)[1]) for n in range(3)]])
    with pytest.raises(DataError, match="the sample that the data cursor has at byte"):
        Stream(small_rules([other[0], other[0]]), 0, cursor)


def damaged(sizes, wounds):
    """Shards of so many samples; a wound (shard, share of its bytes, cut) makes the block there zero or cuts there."""
    contents = [tar_bytes([sized_sample(f"{s}-{i}", 7 * s + i) for i in range(n)]) for s, n in enumerate(sizes)]
    for shard, share, cut in wounds:
        content = contents[shard % len(sizes)]
        at = int(share * len(content)) // 512 * 512
        contents[shard % len(sizes)] = content[:at] + (b"" if cut else bytes(512) + content[at + 512 :])
    return raw_shards(contents)


wounds = st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.99), st.booleans()), max_size=4)


@settings(max_examples=60, deadline=None)
@given(counts, wounds, st.integers(1, 3), st.integers(0, 15))
def test_through_damage_and_over_all_lanes_what_is_left_comes_once_and_the_same_from_any_save_point(
    sizes, wounds, lanes, before
):
    rules = small_rules(damaged(sizes, wounds), lanes=lanes, policy=BadPolicy("skip", 1000, 1000))
    entries = [(index, entry) for index, shard in enumerate(rules.shards) for entry in shard_samples(shard, "image")]
    sound = set()
    for index, entry in entries:
        with suppress(SampleError):
            sound.add(read_entry(rules.shards[index], entry, rules.size).key)
    if not sound:
        return
    seen, bad = Counter(), Counter()
    for lane in range(lanes):
        stream = Stream(rules, lane, StreamCursor())
        while epoch_of(stream.cursor()) < 2 or any(row.epoch < 2 for row in stream.cursor().pool):
            if stream.cursor().packs == before:
                stream = Stream(rules, lane, parse(json.loads(json.dumps(cursor_of(stream)))).streams["image"])
            items, told = stream.next_pack()
            seen.update((item.sample.key, item.address.epoch) for item in items if item.address.epoch < 2)
            bad.update(told)
    assert seen == Counter({(key, epoch): 1 for key in sound for epoch in range(2)})
    assert sum(bad.values()) >= 2 * (len(entries) - len(sound))


def cursor_of(stream):
    return LaneCursor(0, 1, 0, "f", 0, {"image": stream.cursor()}).to_json()


@pytest.mark.parametrize("lanes", [1, 3])
def test_damage_is_counted_once_in_an_epoch_however_many_lanes_share_the_shard(lanes):
    (whole,) = memory_shards([40])
    at = [entry.offset / whole.size for entry in shard_samples(whole, "image")]
    rules = small_rules(damaged([40], [(0, at[5], 0), (0, at[20], 0), (0, at[38], 1)]), lanes=lanes)
    found = [reader_of(rules, lane) for lane in range(lanes)]
    entries = [entry for reader in found for entry in iter(reader.next, None)]
    assert sum(isinstance(entry.entry, Damage) for entry in entries) == 3
    assert all(reader.place == Place(1) for reader in found)


def test_a_stretch_of_damage_tells_how_many_samples_it_has_likely_held():
    (whole,) = memory_shards([60])
    at = [entry.offset for entry in shard_samples(whole, "image")]
    content = whole.storage.files[whole.path]
    hole, cut = content[: at[20]] + bytes(at[32] - at[20]) + content[at[32] :], content[: at[40]]

    def lost(content, samples=None, lanes=1):
        rules = small_rules([replace(shard, samples=samples) for shard in raw_shards([content])], lanes=lanes)
        found = [found for lane in range(lanes) for found in iter(reader_of(rules, lane).next, None)]
        assert all(each.samples == 1 for each in found if not isinstance(each.entry, Damage))
        return [each.samples for each in found if isinstance(each.entry, Damage)]

    assert lost(hole) == [pytest.approx(12, rel=0.35)]  # sizes differ by a factor of two
    assert lost(hole, lanes=3) == lost(hole)  # told by one of the lanes that share the shard
    assert lost(cut) == [1]  # there is no telling what came behind
    assert lost(content[: at[2]] + bytes(at[3] - at[2]) + content[at[3] :]) == [1]
    assert lost(hole, 60) == [1, 12]  # at its place, and at the shard's end what is missing
    assert lost(cut, 60) == [20]
    assert lost(cut, 60, lanes=2) == [20]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_the_metrics_count_what_damage_has_swallowed_whoever_shares_the_shard(lanes):
    (whole,) = memory_shards([60])
    at = [entry.offset for entry in shard_samples(whole, "image")]
    shards = [replace(shard, samples=60) for shard in raw_shards([whole.storage.files[whole.path][: at[20]]] * 3)]
    rules = small_rules(shards, lanes=lanes)
    found = [each for lane in range(lanes) for each in iter(reader_of(rules, lane).next, None)]
    assert sum(each.samples for each in found if isinstance(each.entry, Damage)) == 3 * 40
    bad = Counter()
    for lane in range(lanes):
        stream = Stream(rules, lane, StreamCursor())
        for _ in range(30):
            bad.update(stream.next_pack()[1])
    assert bad["cut"] > 0
    assert bad["cut"] % 40 == 0


def reader_of(rules, lane, place=START):
    (group,) = groups_of(rules.shards, "image", rules.weights)
    return Reader(rules.shards, group, "image", lanes=rules.lanes, lane=lane, seed=rules.seed, place=place)


@settings(max_examples=30, deadline=None)
@given(counts, wounds, st.integers(1, 3))
def test_a_reader_that_starts_at_any_place_of_another_gives_the_rest(sizes, wounds, lanes):
    rules = small_rules(damaged(sizes, wounds), lanes=lanes)
    reader = reader_of(rules, lanes - 1)
    passed = [(reader.next(), reader.place) for _ in range(40)]
    for number, (_, place) in enumerate(passed[:-1]):
        again = reader_of(rules, lanes - 1, place)
        assert again.next() == passed[number + 1][0]


def test_the_storage_hears_which_shards_come_next():
    rules = small_rules(memory_shards([2] * 9))
    reader = reader_of(rules, 0)
    read = []
    while reader.place.epoch < 1:
        found = reader.next()
        if found is not None and (not read or read[-1] != f"m{found.shard}"):
            read.append(f"m{found.shard}")
    following = [f"m{unit.shard}" for unit in units_of_lane(range(9), 1, 0, 0, "image", 1)]
    assert len(set(read)) == 9
    hints = rules.shards[0].storage.hints
    assert len(hints) >= 9
    for number, hint in enumerate(hints[:9]):
        expected = [name for name in (read + following)[number + 1 : number + 5] if name != read[number]]
        assert hint == list(dict.fromkeys(expected))


def test_a_policy_that_fails_ends_the_run_at_the_first_bad_sample():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [("x", {"png": b"junk", "txt": b"t"})]
    rules = small_rules(shards_of([samples]), policy=BadPolicy("fail"))
    with pytest.raises(DataError, match=r"data.on_bad is fail.*m0/x at byte \d+"):
        packs_of(rules, 0, 30)


@pytest.mark.parametrize("policy", [BadPolicy("skip", 1000, 5), BadPolicy("skip", 40, 1000)])
def test_a_resumed_lane_ends_at_the_same_sample_as_the_uninterrupted_one(policy):
    samples = [sized_sample(f"g{n}", n) for n in range(80)]
    for place, many in ((60, 6), (20, 4)):
        samples[place:place] = [(f"x{place}-{n}", {"png": b"junk", "txt": b"t"}) for n in range(many)]
    rules = small_rules(shards_of([samples]), policy=policy)

    def until_the_end(resume_each_pack):
        stream, packs = Stream(rules, 0, StreamCursor()), []
        for _ in range(200):
            try:
                packs.append(keys(stream.next_pack()[0]))
            except DataError as error:
                return packs, str(error)
            if resume_each_pack:
                stream = Stream(rules, 0, stream.cursor())
        raise AssertionError("it never ended")

    assert until_the_end(True) == until_the_end(False)


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
