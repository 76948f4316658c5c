"""Cursors in checkpoints are small and exact, and are refused if damaged or of another run."""

import base64
import json
import logging
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory import memory_shards, shards_of, sized_sample, small_config
from univitar_ds.data.sampler.cursor import (
    LaneCursor,
    ReadPosition,
    StreamCursor,
    parse,
    read_pool,
    write_pool,
)
from univitar_ds.data.sampler.lanes import Stream
from univitar_ds.data.shards.samples import SampleAddress
from univitar_ds.data.shards.sources import fingerprint
from univitar_ds.errors import DataError

PACKS = 1 << 40
counts = st.integers(0, PACKS)
rows = st.builds(
    lambda shard, block, blocks, *rest: SampleAddress(shard, 512 * block, 512 * blocks, *rest),
    *[st.one_of(st.integers(0, 5), counts)] * 6,
)
places = st.builds(ReadPosition, counts, counts, counts, counts, st.integers(-(1 << 40), 1 << 40))
streams = st.builds(
    StreamCursor,
    st.integers(PACKS, 2 * PACKS),
    st.dictionaries(st.text(max_size=8), places, max_size=4),
    st.lists(rows, max_size=30).map(tuple),
    st.tuples(counts, counts, counts),
)
modalities = st.sampled_from(["image", "video"])


def through_json(cursor):
    return parse(json.loads(json.dumps(cursor.to_json())))


@given(st.dictionaries(modalities, streams), st.dictionaries(modalities, st.tuples(counts, counts, counts)), counts)
def test_a_cursor_survives_json(streams, decoding, packs):
    cursor = LaneCursor(1, 4, 7, "f", packs, streams, decoding)
    assert through_json(cursor) == cursor


def test_an_old_cursor_with_only_the_first_part_of_the_fingerprint_is_accepted():
    expected = {"lane": 0, "lanes": 1, "seed": 0}
    assert LaneCursor(0, 1, 0, "ab").expect(**expected, fingerprint="ab:cd") == LaneCursor(0, 1, 0, "ab:cd")
    for saved, now in (("ab", "ac:cd"), ("ab:cd", "ab:ce"), ("ab:cd", "ab")):
        with pytest.raises(DataError, match="the sources have changed"):
            LaneCursor(0, 1, 0, saved).expect(**expected, fingerprint=now)


def lane_of_photos(n, pool_samples, sources=1):
    """The cursor of a stream over samples with the size of photos, after 50 packs."""
    contents = [
        [(f"{s}-{i}", {**sized_sample("k", i)[1], "raw": bytes(20_000 + 977 * (i * 31 % 53))}) for i in range(n)]
        for s in range(sources)
    ]
    shards = shards_of(contents, sources=[f"source{s}" for s in range(sources)])
    weights = {f"source{s}": 4 + s for s in range(sources)} if sources > 1 else {}
    stream = Stream(small_config(shards, lanes=4, pool_samples=pool_samples, weights=weights), 0, StreamCursor())
    for _ in range(50):
        stream.next_pack()
    return stream.cursor()


@pytest.mark.parametrize("sources", [1, 3])
def test_the_cursor_of_a_lane_is_small(sources, record_property, capsys):
    """With the default of 192 samples in the shuffle buffer: 0.3 KB, and 4 bytes per sample."""
    cursor = lane_of_photos(2000 // sources, 192, sources)
    size = len(json.dumps(LaneCursor(0, 4, 0, "f" * 32, 50, {"image": cursor}).to_json()))
    plain = len(json.dumps([list(row) for row in cursor.pool]))
    with capsys.disabled():
        print(f" [cursor of 192 samples of {sources} source(s): {size} bytes; its pool as lists: {plain}]", end="")
    assert len(cursor.pool) > 180
    assert size < 1400 < plain / 3


@given(st.lists(rows, min_size=1, max_size=20), st.data())
def test_a_shuffle_buffer_with_one_wrong_letter_is_refused(some, data):
    text = write_pool(some, PACKS)
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.sampled_from("09azAZ!~ "))
    wrong = text[:at] + letter + text[at + 1 :]
    document = LaneCursor(0, 1, 0, "f", 0, {"image": StreamCursor(PACKS, pool=tuple(some))}).to_json()
    document["streams"]["image"]["pool"] = wrong
    pool = tuple(some)
    with suppress(DataError):  # some changes of the last letter do not change the decoded bytes
        pool = parse(document).streams["image"].pool
    assert pool == tuple(some)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this program reads 3"),
        ({"packs": -1}, "is damaged"),
        ({"packs": True}, "is damaged"),
        ({"streams": {"image": {"packs": 0, "pool": ""}}}, "is damaged"),
        (
            {"streams": {"image": {"packs": 0, "places": {}, "reading": [0, 0], "pool": write_pool([], 0)}}},
            "is damaged",
        ),
        ({"streams": {"image": {"packs": 0, "places": {"": [1]}, "reading": [0] * 3, "pool": ""}}}, "is damaged"),
        ({"streams": {"sound": None}}, "is damaged"),
        ({"streams": []}, "is damaged"),
        ({"decoding": {"image": ["x", 0, 0]}}, "is damaged"),
    ],
)
def test_a_damaged_cursor_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        parse({**LaneCursor(0, 4, 0, "f").to_json(), **change})
    with pytest.raises(DataError, match="has version None"):
        parse([])


@pytest.mark.parametrize("since", [-1, 6])
def test_a_sample_with_an_impossible_waiting_time_is_damage(since):
    document = LaneCursor(
        0, 1, 0, "f", 5, {"image": StreamCursor(5, pool=(SampleAddress(0, 0, 512, 0, 0, since),))}
    ).to_json()
    with pytest.raises(DataError, match="is damaged"):
        parse(document)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [(bytes([1] * 13), "13 numbers in rows of 6"), (bytes([1, 2, 0x80]), "the last number is truncated")],
)
def test_a_truncated_shuffle_buffer_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        read_pool(base64.b85encode(zlib.crc32(numbers).to_bytes(4) + zlib.compress(numbers, wbits=-15)).decode(), 9)


@pytest.mark.parametrize(
    ("name", "given"), [("data.lanes", {"lanes": 8}), ("seed", {"seed": 1}), ("lane", {"lane": 1})]
)
def test_the_error_for_a_cursor_of_another_run_names_the_difference(name, given):
    expected = {"lane": 0, "lanes": 4, "seed": 0, "fingerprint": "f", "accept_changed_sources": True, **given}
    with pytest.raises(DataError, match=rf"the saved data cursor has {name} \d, this run \d; resume with \d"):
        LaneCursor(0, 4, 0, "f").expect(**expected)


def test_the_error_for_changed_sources_names_the_remedies():
    saved = LaneCursor(0, 1, 0, fingerprint(memory_shards([20, 20])))
    with pytest.raises(
        DataError,
        match=r"sources have changed since the data cursor was saved .*restore the same shards.*accept_changed_sources",
    ):
        saved.expect(lane=0, lanes=1, seed=0, fingerprint=fingerprint(memory_shards([20, 30])))


def test_accepted_changed_sources_begin_at_the_next_epoch_and_keep_the_counts(caplog):
    before = small_config(memory_shards([20, 20]))
    stream = Stream(before, 0, StreamCursor())
    for _ in range(3):
        stream.next_pack()
    saved = LaneCursor(0, 1, 0, fingerprint(before.shards), 3, {"image": stream.cursor()}, {"image": (9, 2, 1)})
    after = small_config(memory_shards([30, 12, 5]))
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            cursor = saved.expect(
                lane=0, lanes=1, seed=0, fingerprint=fingerprint(after.shards), accept_changed_sources=True
            )
    assert [record.getMessage()[:24] for record in caplog.records] == ["the sources have changed"]
    assert (cursor.packs, cursor.decoding, cursor.fingerprint) == (3, {"image": (9, 2, 1)}, fingerprint(after.shards))
    assert cursor.streams["image"].reading == stream.cursor().reading
    assert cursor.streams["image"].pool == ()
    epoch = cursor.streams["image"].places[""].epoch
    assert epoch > stream.cursor().places[""].epoch
    stream = Stream(after, 0, cursor.streams["image"])
    seen = []
    while stream.cursor().places[""].epoch == epoch or any(row.epoch == epoch for row in stream.cursor().pool):
        seen += [item.key for item in stream.next_pack()[0] if item.address.epoch == epoch]
    assert sorted(seen) == sorted(f"{s}-{i}" for s, n in enumerate([30, 12, 5]) for i in range(n))


def test_a_cursor_is_accepted_for_the_same_data_in_another_location():
    shards = memory_shards([3, 4])
    assert through_json(LaneCursor(0, 1, 0, fingerprint(shards))).expect(
        lane=0, lanes=1, seed=0, fingerprint=fingerprint(memory_shards([3, 4]))
    )
