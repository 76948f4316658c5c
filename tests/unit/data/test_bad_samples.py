"""A lane skips, counts and logs damaged and unusable samples, and does so equally in every run."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import (
    counts,
    damaged,
    epoch_of,
    keys,
    memory_shards,
    packs_of,
    raw_shards,
    reader_of,
    shards_of,
    sized_sample,
    small_config,
    tiny_image,
    wounds,
)
from univitar_ds.data.sampler.bad_samples import BadPolicy
from univitar_ds.data.sampler.cursor import LaneCursor, ReadPosition, StreamCursor, parse
from univitar_ds.data.sampler.lanes import Stream
from univitar_ds.data.sampler.reader import BadSample, read_entries
from univitar_ds.data.shards.index_cache import shard_samples
from univitar_ds.data.shards.samples import Sample
from univitar_ds.errors import DataError


def cursor_of(stream):
    return LaneCursor(0, 1, 0, "f", 0, {"image": stream.cursor()}).to_json()


def test_a_bad_sample_is_counted_by_kind_and_logged_with_shard_key_and_byte(caplog):
    samples = [sized_sample(f"g{n}", n) for n in range(30)]
    samples[3:3] = [
        ("x", {"png": tiny_image(20, 20)}),
        ("y", {"png": b"junk", "txt": b"t"}),
        ("z", {"png": tiny_image(20, 20), "json": b"{"}),
    ]
    with caplog.at_level(logging.WARNING):
        packs, _ = packs_of(small_config(shards_of([samples])), 0, 1)
    assert packs[0][1] == {"no_caption": 1, "unreadable": 1, "bad_json": 1}
    assert "sample left out (no_caption, number 1; lane 0, image): m0/x at byte 6144: neither" in caplog.text


def test_too_many_bad_samples_in_a_row_end_the_run():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(6)]
    limit = r"lane 0, image: 6 samples in a row .*data.max_bad_in_a_row is 5\).*: m0/x5 at byte \d+: the"
    with pytest.raises(DataError, match=limit):
        packs_of(small_config(shards_of([samples])), 0, 30)


def test_the_allowed_number_of_bad_samples_in_a_row_is_skipped():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(5)]
    packs, _ = packs_of(small_config(shards_of([samples])), 0, 30)
    assert sum(sum(bad.values()) for _, bad in packs) >= 5


def test_data_without_a_readable_sample_is_an_error_and_no_endless_loop():
    for contents in ([[], []], [[("x", {"png": b"junk", "txt": b"t"})], []]):
        with pytest.raises(DataError, match="none of the 2 shards has a readable image sample"):
            packs_of(small_config(shards_of(contents)), 0, 1)


def test_buffered_samples_that_the_next_stage_does_not_allow_are_left_out_and_counted():
    shards = memory_shards([60])
    _, cursor = packs_of(small_config(shards), 0, 3)
    config = small_config(shards)
    tighter = replace(config, size=replace(config.size, max_image_px=10 * 196), policy=BadPolicy("skip", 1000, 60))
    ((items, bad),), after = packs_of(tighter, 0, 1, cursor)
    too_large = [row for row in cursor.pool if (1 + row.ordinal % 5) * (1 + row.ordinal // 5 % 4) > 10]
    assert bad["too_large"] >= len(too_large) > 0
    assert max(item.tokens for item in items) <= 10
    assert after.reading[1] == bad["too_large"] - len(too_large), "the stage's choice counts as bad data"


@settings(max_examples=60, deadline=None)
@given(counts, wounds, st.integers(1, 3), st.integers(0, 15))
def test_every_sound_sample_of_damaged_shards_comes_once_per_epoch_also_after_a_resume(sizes, wounds, lanes, before):
    config = small_config(damaged(sizes, wounds), lanes=lanes, policy=BadPolicy("skip", 1000, 1000))
    entries = [(index, entry) for index, shard in enumerate(config.shards) for entry in shard_samples(shard, "image")]
    sound = set()
    for index, entry in entries:
        ((_, _, found),) = read_entries(config.shards[index], [(entry, 0)], config.size)
        if isinstance(found, Sample):
            sound.add(found.key)
    if not sound:
        return
    seen, bad = Counter(), Counter()
    for lane in range(lanes):
        stream = Stream(config, lane, StreamCursor())
        while epoch_of(stream.cursor()) < 2 or any(row.epoch < 2 for row in stream.cursor().pool):
            if stream.cursor().packs == before:
                stream = Stream(config, lane, parse(json.loads(json.dumps(cursor_of(stream)))).streams["image"])
            items, counts = stream.next_pack()
            seen.update((item.key, item.address.epoch) for item in items if item.address.epoch < 2)
            bad.update(counts)
    assert seen == Counter({(key, epoch): 1 for key in sound for epoch in range(2)})
    assert sum(bad.values()) >= 2 * (len(entries) - len(sound))


@pytest.mark.parametrize("lanes", [1, 3])
def test_damage_is_counted_once_per_epoch_if_several_lanes_share_the_shard(lanes):
    (whole,) = memory_shards([40])
    at = [entry.offset / whole.size for entry in shard_samples(whole, "image")]
    config = small_config(damaged([40], [(0, at[5], 0), (0, at[20], 0), (0, at[38], 1)]), lanes=lanes)
    found = [reader_of(config, lane) for lane in range(lanes)]
    entries = [entry for reader in found for entry in iter(reader.next, None)]
    assert sum(isinstance(entry, BadSample) and entry.kind in ("damaged", "cut") for entry in entries) == 3
    assert all(reader.place == ReadPosition(1) for reader in found)


def test_damage_is_reported_with_an_estimate_of_the_lost_samples():
    (whole,) = memory_shards([60])
    at = [entry.offset for entry in shard_samples(whole, "image")]
    content = whole.storage.files[whole.path]
    hole, cut = content[: at[20]] + bytes(at[32] - at[20]) + content[at[32] :], content[: at[40]]

    def lost(content, samples=None, lanes=1):
        config = small_config([replace(shard, samples=samples) for shard in raw_shards([content])], lanes=lanes)
        found = [found for lane in range(lanes) for found in iter(reader_of(config, lane).next, None)]
        return [each.samples for each in found if isinstance(each, BadSample)]

    assert lost(hole) == [pytest.approx(12, rel=0.35)]  # sizes differ by a factor of two
    assert lost(hole, lanes=3) == lost(hole)  # one of the lanes that share the shard reports it
    assert lost(cut) == [1]  # the number of samples after the cut is unknown
    assert lost(content[: at[2]] + bytes(at[3] - at[2]) + content[at[3] :]) == [1]
    assert lost(hole, 60) == [1, 12]  # one at the damage, and at the end of the shard the number that is missing
    assert lost(cut, 60) == [20]
    assert lost(cut, 60, lanes=2) == [20]


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_counts_include_all_samples_lost_to_damage_for_any_number_of_lanes(lanes):
    (whole,) = memory_shards([60])
    at = [entry.offset for entry in shard_samples(whole, "image")]
    shards = [replace(shard, samples=60) for shard in raw_shards([whole.storage.files[whole.path][: at[20]]] * 3)]
    config = small_config(shards, lanes=lanes)
    found = [each for lane in range(lanes) for each in iter(reader_of(config, lane).next, None)]
    assert sum(each.samples for each in found if isinstance(each, BadSample)) == 3 * 40
    bad = Counter()
    for lane in range(lanes):
        stream = Stream(config, lane, StreamCursor())
        for _ in range(30):
            bad.update(stream.next_pack()[1])
    assert bad["cut"] > 0
    assert bad["cut"] % 40 == 0


def test_on_bad_fail_ends_the_run_at_the_first_bad_sample():
    samples = [sized_sample(f"g{n}", n) for n in range(60)]
    samples[40:40] = [("x", {"png": b"junk", "txt": b"t"})]
    config = small_config(shards_of([samples]), policy=BadPolicy("fail"))
    with pytest.raises(DataError, match=r"data.on_bad is fail.*m0/x at byte \d+"):
        packs_of(config, 0, 30)


@pytest.mark.parametrize("policy", [BadPolicy("skip", 1000, 5), BadPolicy("skip", 40, 1000)])
def test_a_resumed_lane_ends_at_the_same_sample_as_the_uninterrupted_one(policy):
    samples = [sized_sample(f"g{n}", n) for n in range(80)]
    for place, many in ((60, 6), (20, 4)):
        samples[place:place] = [(f"x{place}-{n}", {"png": b"junk", "txt": b"t"}) for n in range(many)]
    config = small_config(shards_of([samples]), policy=policy)

    def until_the_end(resume_each_pack):
        stream, packs = Stream(config, 0, StreamCursor()), []
        for _ in range(200):
            try:
                packs.append(keys(stream.next_pack()[0]))
            except DataError as error:
                return packs, str(error)
            if resume_each_pack:
                stream = Stream(config, 0, stream.cursor())
        raise AssertionError("it never ended")

    assert until_the_end(True) == until_the_end(False)
