"""A lane yields every sample once per epoch, and the same packs from any cursor on in any process."""

import itertools
import json
import statistics
import sys
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import (
    counts,
    epoch_of,
    keys,
    memory_shards,
    packs_of,
    shards_of,
    sized_sample,
    small_config,
    tiny_image,
)
from tests.support.paths import ROOT
from tests.support.progress import WHOLE_S, run_watched
from tests.support.shards import video
from univitar_ds.data.sampler import reader
from univitar_ds.data.sampler.cursor import LaneCursor, StreamCursor, parse
from univitar_ds.data.sampler.lanes import Lane, Stream
from univitar_ds.errors import DataError


def drained(config, lane, epochs):
    """(key, epoch) of every item until all samples of the first `epochs` epochs of the lane are in packs."""
    stream = Stream(config, lane, StreamCursor())
    seen = []
    while epoch_of(stream.cursor()) < epochs or any(row.epoch < epochs for row in stream.cursor().pool):
        items, _ = stream.next_pack()
        assert len(set(keys(items))) == len(items), "a pack holds a sample twice"
        waiting = [row.epoch for row in stream.cursor().pool]
        assert max(waiting, default=0) - min(waiting, default=0) <= 1, "the shuffle buffer holds more than two epochs"
        seen += [(item.key, item.address.epoch) for item in items]
    return seen


@settings(max_examples=30, deadline=None)
@given(counts, st.integers(1, 4), st.integers(0, 3))
def test_every_sample_is_in_one_pack_per_epoch_over_all_lanes(sizes, lanes, seed):
    config = small_config(memory_shards(sizes), lanes=lanes, seed=seed)
    seen = Counter(entry for lane in range(lanes) for entry in drained(config, lane, 3) if entry[1] < 3)
    everything = [f"{shard}-{index}" for shard, count in enumerate(sizes) for index in range(count)]
    assert seen == Counter({(key, epoch): 1 for key in everything for epoch in range(3)})


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 3), st.integers(0, 30), st.integers(1, 10))
def test_the_same_packs_follow_any_cursor(sizes, lanes, before, after):
    config = small_config(memory_shards(sizes, captions=3), lanes=lanes)
    lane = lanes - 1
    stream = Stream(config, lane, StreamCursor())
    for _ in range(before):
        stream.next_pack()
    saved = LaneCursor(lane, lanes, 0, "f", before, {"image": stream.cursor()})
    loaded = parse(json.loads(json.dumps(saved.to_json())))
    assert loaded == saved
    whole = [stream.next_pack() for _ in range(after)]
    resumed, end = packs_of(config, lane, after, loaded.streams["image"])
    assert resumed == whole
    assert end == stream.cursor()


def test_a_resume_reads_only_the_samples_of_the_shuffle_buffer():
    shards = memory_shards([400])
    storage = shards[0].storage
    config = small_config(shards)
    stream = Stream(config, 0, StreamCursor())
    for _ in range(60):
        stream.next_pack()
    cursor = stream.cursor()
    storage.ranges_read = 0
    Stream(config, 0, cursor)
    assert storage.ranges_read == len(cursor.pool) < 20


def test_the_saved_shuffle_buffer_is_read_concurrently_from_a_remote_store():
    """Reading 6,000 samples of 32 lanes sequentially, at 30 ms each, would take minutes."""
    shards = memory_shards([400])
    storage, read = shards[0].storage, shards[0].storage.read_range
    config = small_config(shards)
    whole, cursor = packs_of(config, 0, 20)
    four, calls, arrived = threading.Barrier(4), itertools.count(), []

    def read_with_three_others(*address):
        if next(calls) < 4:
            arrived.append(four.wait(timeout=WHOLE_S))
        return read(*address)

    storage.read_range = read_with_three_others
    resumed = Stream(config, 0, cursor)
    assert sorted(arrived) == [0, 1, 2, 3]
    storage.read_range = read
    assert [resumed.next_pack() for _ in range(5)] == packs_of(config, 0, 5, cursor)[0] != whole


def test_large_saved_samples_are_read_one_at_a_time(monkeypatch):
    monkeypatch.setattr(reader, "_MOST_AGAIN", 4000)
    shards = memory_shards([400])
    config = small_config(shards)
    _, cursor = packs_of(config, 0, 20)
    threads = set()
    read = shards[0].storage.read_range
    shards[0].storage.read_range = lambda *address: threads.add(threading.get_ident()) or read(*address)
    Stream(config, 0, cursor)
    assert max(row.length for row in cursor.pool) > 2000
    assert threads == {threading.get_ident()}


def test_the_first_shards_of_all_lanes_are_prefetched_before_a_lane_is_read():
    shards = memory_shards([3] * 64)
    storage, opened = shards[0].storage, []
    config = {"image": small_config(shards, lanes=8)}
    open_shard = storage.open
    storage.open = lambda path: opened.append(path) or open_shard(path)
    lanes = [Lane(config, LaneCursor(number, 8, 0, "f")) for number in range(8)]
    for lane in lanes:
        lane.begin("image")
    hinted = [path for hint in storage.hints for path in hint]
    assert (len(set(hinted)), opened) == (8, [])
    for number, lane in enumerate(lanes):
        opened.clear()
        lane.next_plan("image", 0)
        assert opened[0] == hinted[number]


def test_a_group_without_the_modality_is_scanned_once_for_all_lanes():
    """Looking for videos in a source of images, each lane scans its own shards, and one lane then scans all of them."""
    shards = memory_shards([2] * 64, modality=None, sources=["a"] * 32 + ["b"] * 32)
    videos = [(f"c{n}", {"mp4": video(16, 16), "txt": b"moves"}) for n in range(8)]
    shards[:32] = shards_of([videos] * 32, modality=None, sources=["a"] * 32)
    config = small_config(shards, lanes=8, modality="video", weights={"a": 1, "b": 1}, frames=2)
    opened: Counter[str] = Counter()
    storage = shards[-1].storage
    open_shard = storage.open
    storage.open = lambda path: opened.update([path]) or open_shard(path)
    streams = [Stream(config, lane, StreamCursor()) for lane in range(8)]
    for stream in streams:
        stream.next_pack()
        assert stream.cursor().empty == ("b",)
    assert opened == Counter({shard.path: 2 for shard in shards[32:]})


def test_the_plans_of_a_lane_do_not_depend_on_the_other_lanes_of_its_rank():
    """Two ranks with two lanes each yield the same plans as one rank with four."""
    shards = memory_shards([30, 30])
    config = {"image": small_config(shards, lanes=4)}

    def run(owned):
        lanes = [Lane(config, LaneCursor(lane, 4, 0, "f")) for lane in owned]
        plans = [lane.next_plan("image", step) for step in range(8) for lane in lanes]
        return {(plan.index, plan.lane): (keys(plan.samples), plan.cursor) for plan in plans}

    assert run([0, 1, 2, 3]) == run([0, 1]) | run([2, 3])


def test_each_modality_of_a_lane_continues_at_its_own_position():
    """Packs of videos in between do not change the packs of images, and the cursor has both streams."""
    shards = memory_shards([40], modality=None)
    config = small_config(shards)
    alone = packs_of(config, 0, 4)[0]
    videos = small_config(memory_shards([40]), seed=9)  # used as a second, independent stream
    lane = Lane({"image": config, "video": videos}, LaneCursor(0, 1, 0, "f"))
    mixed = [lane.next_plan(modality, n) for n, modality in enumerate(["image", "video", "video", "image", "image"])]
    assert [(list(p.samples), p.bad) for p in mixed if p.modality == "image"] == alone[:3]
    cursor = mixed[-1].cursor
    assert (cursor.packs, cursor.streams["image"].packs, cursor.streams["video"].packs) == (5, 3, 2)
    resumed = Lane({"image": config, "video": videos}, parse(json.loads(json.dumps(cursor.to_json()))))
    assert resumed.next_plan("image", 5) == lane.next_plan("image", 5)
    assert resumed.next_plan("video", 6) == lane.next_plan("video", 6)


def test_packs_mix_samples_from_distant_parts_of_a_shard():
    config = small_config(memory_shards([300]), pool_samples=64)
    packs, _ = packs_of(config, 0, 20)
    spans = [max(i.address.ordinal for i in items) - min(i.address.ordinal for i in items) for items, _ in packs]
    assert sum(spans) / len(spans) > 30
    ordinals = [[item.address.ordinal for item in items] for items, _ in packs]
    together = sum(ordinal + 1 in pack for pack in ordinals for ordinal in pack)
    assert together < 0.3 * sum(map(len, ordinals))


def test_no_sample_waits_more_packs_than_the_shuffle_buffer_has_samples():
    config = small_config(memory_shards([40] * 10))
    packs, _ = packs_of(config, 0, 300)
    waits = [left - item.address.since for left, (items, _) in enumerate(packs) for item in items]
    assert 3 < max(waits) < config.pool_samples + 8


@pytest.mark.parametrize("pool_samples", [16, 32, 64])
def test_waiting_times_vary_less_than_with_a_uniformly_random_choice(pool_samples):
    """With a uniformly random choice, their standard deviation would be about equal to their mean."""
    packs, _ = packs_of(small_config(memory_shards([40] * 10), pool_samples=pool_samples), 0, 250)
    waits = [left - item.address.since for left, (items, _) in enumerate(packs) for item in items]
    assert statistics.pstdev(waits) <= 0.6 * statistics.fmean(waits)


def test_the_shuffle_buffer_exceeds_pool_samples_if_items_are_small():
    shards = shards_of([[(f"k{n}", {"png": tiny_image(14, 14), "txt": b"one token"}) for n in range(300)]])
    packs, _ = packs_of(small_config(shards, pool_samples=4), 0, 5)
    assert [len(items) for items, _ in packs] == [40] * 5


def test_packs_stay_full_across_the_end_of_an_epoch():
    config = small_config(memory_shards([60]), pool_samples=32)
    packs, end = packs_of(config, 0, 60)
    assert epoch_of(end) >= 3
    fills = [sum(item.tokens for item in items) / 40 for items, _ in packs]
    assert min(fills) >= 0.95


def test_the_caption_of_each_epoch_is_random_and_reproducible():
    config = small_config(memory_shards([8], captions=4))
    chosen = [{i.key: i.caption for i in items} for items, _ in packs_of(config, 0, 40)[0]]
    assert chosen == [{i.key: i.caption for i in items} for items, _ in packs_of(config, 0, 40)[0]]
    assert len({caption for pack in chosen for caption in pack.values()}) == 8 * 4


def test_each_stream_reads_only_its_own_samples_of_mixed_shards():
    mixed = [
        sized_sample("a", 0),
        ("b", {"mp4": b"no video", "txt": b"t"}),
        ("c", {"txt": b"no media"}),
        sized_sample("d", 1),
    ]
    packs, _ = packs_of(small_config(shards_of([mixed], modality=None)), 0, 1)
    items, bad = packs[0]
    assert {"a", "d"} == set(keys(items))
    assert set(bad) == {"no_media"}  # "c", which only the stream of images counts; it ignores the video "b"
    with pytest.raises(DataError, match=r"none of the 1 shards has a readable video sample \(left out: 1 unreadable\)"):
        packs_of(small_config(shards_of([mixed], modality=None), modality="video", frames=2), 0, 1)


def test_a_lane_without_a_sample_in_one_epoch_continues_with_the_next():
    config = small_config(memory_shards([1]), lanes=4)
    for lane in range(4):
        packs, end = packs_of(config, lane, 2)
        assert [keys(items) for items, _ in packs] == [["0-0"], ["0-0"]]
        assert epoch_of(end) >= 1


def test_a_cursor_whose_addresses_are_no_samples_is_refused():
    _, cursor = packs_of(small_config(memory_shards([20, 20])), 0, 3)
    other = shards_of([[(f"other{n}", sized_sample("k", n)[1]) for n in range(3)]])
    with pytest.raises(DataError, match="the data cursor refers to a sample at byte"):
        Stream(small_config([other[0], other[0]]), 0, cursor)


def test_the_order_does_not_depend_on_the_process():
    """An interpreter with another hash seed yields the same packs."""
    code = (
        "from tests.support.memory import *; from univitar_ds.data.sampler.lanes import *;"
        "s = Stream(small_config(memory_shards([30, 9]), lanes=3), 1, StreamCursor());"
        "print([[i.key for i in s.next_pack()[0]] for _ in range(9)])"
    )
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    there = run_watched([sys.executable, "-c", code], env=environment, check=True)
    here = packs_of(small_config(memory_shards([30, 9]), lanes=3), 1, 9)[0]
    assert there.stdout.strip() == str([keys(items) for items, _ in here])
