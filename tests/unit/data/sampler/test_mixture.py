"""Mixtures: shares of sources, epochs per source, and changes of weights between stages."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import memory_shards, shards_of, sized_sample, small_config, tiny_image
from univitar_ds.data.sampler.cursor import LaneCursor, ReadPosition, StreamCursor, parse
from univitar_ds.data.sampler.lanes import LONG_WAIT, Stream
from univitar_ds.data.sampler.mixture import WeightedRoundRobin
from univitar_ds.data.shards.sources import WHOLE, ShardGroup, groups_of, shares_of
from univitar_ds.errors import DataError

weights = st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1)


@given(weights, st.integers(1, 400))
def test_shares_hold_within_two_samples_after_any_number_of_samples(weights, n):
    shares = shares_of(weights)
    round_robin, taken = WeightedRoundRobin(shares, {}), Counter()
    for _ in range(n):
        name = round_robin.next()
        taken[name] += 1
        round_robin.taken(name)
    for name, share in shares.items():
        assert abs(taken[name] - Fraction(n * share, sum(shares.values()))) < 2
    assert sum(round_robin.credits.values()) == 0


@given(weights, st.integers(0, 50))
def test_the_round_robin_continues_from_saved_credits(weights, n):
    round_robin = WeightedRoundRobin(shares_of(weights), {})
    for _ in range(n):
        round_robin.taken(round_robin.next())
    again = WeightedRoundRobin(shares_of(weights), json.loads(json.dumps(round_robin.credits)))
    for _ in range(20):
        name = round_robin.next()
        assert again.next() == name
        again.taken(name), round_robin.taken(name)


def test_shares_are_computed_from_weights_above_zero():
    assert shares_of({"a": 3, "b": 0, "c": 1}) == {"a": 750_000, "c": 250_000}
    assert shares_of({"a": 1e-9, "b": 1}) == {"a": 1, "b": WHOLE}


def mixed(*counts_of_sources, modality="image", **fields):
    """Shards of sources a, b, ... with so many samples; keys are "{shard}-{number}"."""
    names = [name for name, counts in zip("abcdef", counts_of_sources, strict=False) for _ in counts]
    flat = [count for counts in counts_of_sources for count in counts]
    return memory_shards(flat, modality, sources=names, **fields)


def drawn(config, packs, start=None, lane=0):
    """(source, key, epoch) of every item of the next packs, and the cursor after them."""
    stream = Stream(config, lane, start or StreamCursor())
    items = [item for _ in range(packs) for item in stream.next_pack()[0]]
    return [(item.shard.source, item.key, item.address.epoch) for item in items], stream.cursor()


@pytest.mark.parametrize("lanes", [1, 4])
def test_weights_hold_within_one_percent_over_a_thousand_packs(lanes):
    weights = {"a": 5, "b": 2.5, "c": 0.5}
    config = small_config(mixed([60, 50], [40], [300]), lanes=lanes, weights=weights)
    items = [item for lane in range(lanes) for item in drawn(config, 1000 // lanes, lane=lane)[0]]
    seen = Counter(source for source, _, _ in items)
    for name, weight in weights.items():
        assert abs(seen[name] / len(items) - weight / 8) < 0.01 * weight / 8 + 16 * lanes / len(items)
        assert abs(seen[name] / len(items) - weight / 8) < 0.01


@pytest.mark.parametrize(("weights", "warned"), [({"a": 1, "b": 1}, True), ({"a": 40, "b": 1}, False)])
def test_a_source_with_too_few_samples_for_its_weight_causes_one_warning(caplog, weights, warned):
    """A pack contains a sample at most once, so four samples cannot be half of a large pack."""
    config = replace(small_config(mixed([200], [4]), lanes=3, weights=weights), token_budget=100)
    for lane in range(3):
        drawn(config, 30, lane=lane)
    messages = [record.getMessage() for record in caplog.records if "too few samples" in record.getMessage()]
    assert len(messages) == warned
    assert (
        not warned or "because source b has too few samples in a lane for its weight; lower its weight" in messages[0]
    )


def test_without_weights_all_sources_share_epochs_with_every_sample_once():
    config = small_config(mixed([20, 20], [7]))
    items, cursor = drawn(config, 60)
    assert set(cursor.places) == {""}
    whole = [Counter(key for _, key, epoch in items if epoch == number) for number in range(3)]
    assert all(set(seen.values()) == {1} and len(seen) == 47 for seen in whole)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(1, 3),
    st.integers(0, 12),
)
def test_with_weights_every_source_has_its_own_epochs_with_every_sample_once(counts, weights, lanes, resumed_after):
    if not all(map(sum, counts)):
        return
    config = small_config(mixed(*counts), lanes=lanes, weights=dict(zip("abc", weights, strict=True)))
    seen = Counter()
    for lane in range(lanes):
        stream = Stream(config, lane, StreamCursor())
        for pack in range(1000):  # many packs are needed if a source with a large weight has only one sample
            if pack == resumed_after:
                saved = LaneCursor(lane, lanes, 0, "f", 0, {"image": stream.cursor()}).to_json()
                stream = Stream(config, lane, parse(json.loads(json.dumps(saved))).streams["image"])
            items, _ = stream.next_pack()
            assert len({item.key for item in items}) == len(items), "a pack holds a sample twice"
            seen.update((item.key, item.address.epoch) for item in items)
            cursor = stream.cursor()
            if pack > resumed_after and done(config, cursor, 2):
                break
        assert done(config, cursor, 2)
    expected = {f"{shard}-{i}" for shard, n in enumerate(n for some in counts for n in some) for i in range(n)}
    assert Counter({entry: n for entry, n in seen.items() if entry[1] < 2}) == Counter(
        {(key, epoch): 1 for key in expected for epoch in range(2)}
    )


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(0, 12))
def test_a_mixture_continues_from_any_cursor_with_the_same_packs(weights, before):
    config = small_config(mixed([20], [30], [25]), weights=weights)
    whole, end = drawn(config, before + 8)
    first, cursor = drawn(config, before)
    saved = LaneCursor(0, 1, 0, "f", 0, {"image": cursor}).to_json()
    rest, after = drawn(config, 8, parse(json.loads(json.dumps(saved))).streams["image"])
    assert first + rest == whole
    assert after == end


def done(config, cursor, epochs):
    """Whether all samples of the first `epochs` epochs of all sources are in packs."""
    return all(place.epoch >= epochs for place in cursor.places.values()) and all(
        row.epoch >= epochs for row in cursor.pool
    )


def test_a_source_without_the_modality_is_left_out_and_the_others_share():
    images, videos, both = memory_shards([9, 9, 9], sources=["a", "b", "c"])
    shards = [images, replace(videos, modality="video"), replace(both, modality=None)]
    weights = {"a": 1, "b": 8, "c": 3}
    groups = {name: groups_of(shards, name, weights) for name in ("image", "video")}
    assert groups["image"] == [ShardGroup("a", 250_000, (0,)), ShardGroup("c", 750_000, (2,))]
    assert groups["video"] == [ShardGroup("b", 727_273, (1,)), ShardGroup("c", 272_727, (2,))]
    seen = Counter(source for source, _, _ in drawn(small_config(shards, weights=weights), 40)[0])
    assert set(seen) == {"a", "c"}


def test_a_source_without_a_weight_or_with_weight_zero_is_not_read():
    config = small_config(mixed([30], [30], [30]), weights={"a": 1, "b": 0})
    assert {source for source, _, _ in drawn(config, 40)[0]} == {"a"}


def test_the_error_for_a_source_without_readable_samples_names_it():
    shards = shards_of([[sized_sample("k", 3)], [("x", {"png": b"junk", "txt": b"t"})]], sources=["good", "broken"])
    with pytest.raises(DataError, match="none of the 1 shards of source broken has a readable image sample"):
        drawn(small_config(shards, weights={"good": 1, "broken": 1}), 20)


def test_bad_samples_do_not_reduce_the_share_of_a_source():
    junk = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(2)]
    broken = [part for n in range(30) for part in ([*junk, sized_sample(f"b{n}", n)])]
    shards = shards_of([[sized_sample(f"a{n}", n) for n in range(30)], broken], sources=["a", "b"])
    seen = Counter(source for source, _, _ in drawn(small_config(shards, weights={"a": 1, "b": 1}), 60)[0])
    assert abs(seen["a"] - seen["b"]) <= 16


STAGES = [
    {},
    {"a": 1, "b": 1},
    {"a": 5, "c": 1},
    {"a": 1, "b": 1, "c": 1},
    {"b": 1},
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(STAGES[1:]), st.integers(1, 9)), min_size=2, max_size=6), st.booleans())
def test_no_sample_of_an_epoch_is_lost_or_repeated_if_weights_change_between_stages(stages, unweighted_first):
    config = small_config(mixed([15], [9, 8], [11]))
    items, cursor = drawn(config, 4) if unweighted_first else ([], StreamCursor())
    first = cursor.places[""].epoch + 1 if unweighted_first else 0
    for weights, packs in [*stages, (STAGES[3], 80)]:
        more, cursor = drawn(replace(config, weights=weights), packs, cursor)
        items += more
    for source, n in (("a", 15), ("b", 17), ("c", 11)):
        seen = Counter((epoch, key) for name, key, epoch in items if name == source and epoch >= first)
        begun = min(epoch for epoch, _ in seen)
        waiting = [row.epoch for row in cursor.pool if config.shards[row.shard].source == source]
        finished = min([cursor.places[source].epoch, *waiting])
        whole = Counter({entry: times for entry, times in seen.items() if entry[0] < finished})
        assert finished > begun
        assert set(whole.values()) == {1}
        assert len(whole) == n * (finished - begun)


def test_a_stage_continues_each_source_at_its_last_position_in_any_earlier_stage():
    config = small_config(mixed([40], [40]), weights={"a": 1, "b": 1})
    _, cursor = drawn(config, 5)
    _, without = drawn(replace(config, weights={"a": 1}), 5, cursor)
    assert without.places["b"] == cursor.places["b"]
    assert without.places["a"] > cursor.places["a"]
    _, together = drawn(replace(config, weights={}), 1, without)
    assert together.places[""].epoch > max(place.epoch for place in without.places.values())
    assert {name: together.places[name] for name in "ab"} == without.places


@pytest.mark.parametrize("packs", [11, 15])
def test_a_source_that_a_later_stage_adds_has_the_same_first_epoch_in_all_lanes(packs):
    config = small_config(mixed([50, 43], [40, 33]), lanes=4, weights={"a": 1})
    cursors = [drawn(config, packs, lane=lane)[1] for lane in range(4)]
    later = replace(config, weights={"b": 1})
    items = [item for lane, cursor in enumerate(cursors) for item in drawn(later, 12, cursor, lane)[0]]
    begun = {cursor.places["a"].epoch for cursor in cursors}
    first = min(epoch for source, _, epoch in items if source == "b")
    seen = Counter(key for source, key, epoch in items if (source, epoch) == ("b", first))
    assert len(begun) > 1
    assert set(seen.values()) == {1}
    assert len(seen) == 73


def fills(config, packs, start=None, lane=0):
    stream = Stream(config, lane, start or StreamCursor())
    drawn_packs = [stream.next_pack()[0] for _ in range(packs)]
    return [sum(item.tokens for item in pack) / config.token_budget for pack in drawn_packs]


def test_packs_are_full_after_a_change_to_a_stage_without_weights():
    config = small_config(mixed([200], [20]), weights={"a": 2, "b": 1})
    for packs in (10, 25, 40):
        _, cursor = drawn(config, packs)
        assert min(fills(replace(config, weights={}), 10, cursor)) > 0.9


def test_packs_are_full_with_a_small_source_of_large_weight():
    """Its oldest sample, of two epochs ago, is in the next pack, so that reading the source can continue."""
    config = small_config(mixed([400], [30]), weights={"a": 1, "b": 1}, pool_samples=192, token_budget=80)
    assert min(fills(config, 200)) > 0.9


def test_packs_of_few_samples_are_full_with_a_buffer_of_half_an_epoch(caplog):
    """A larger buffer waits for the last samples of an epoch, while it holds most others only once; it is named."""
    config = small_config(mixed([111]), pool_samples=192, token_budget=130)
    assert min(min(fills(replace(config, seed=seed), 30)) for seed in range(4)) < 0.9
    (message,) = {record.getMessage().partition("because ")[2] for record in caplog.records}
    assert "lower data.pool_samples" in message
    caplog.clear()
    for seed in range(4):
        assert min(fills(replace(config, seed=seed, pool_samples=55), 30)) > 0.9
    assert caplog.records == []


def test_the_oldest_sample_of_a_starved_source_comes_first_until_another_has_waited_too_long():
    stream = Stream(small_config(mixed([40], [40]), weights={"a": 3, "b": 1}), 0, StreamCursor())
    stream.next_pack()
    oldest, *_ = stream._candidates(None)
    starved = next(name for name in "ab" if name != stream._group_at(oldest))
    first, second, *rest = stream._candidates(starved)
    assert stream._group_at(first) == starved
    assert first == min(index for index in [first, second, *rest] if stream._group_at(index) == starved)
    assert second == oldest
    stream._packs += LONG_WAIT + 1
    assert stream._candidates(starved)[0] == oldest


def test_buffered_samples_of_a_source_that_the_next_stage_drops_are_still_used():
    config = small_config(mixed([40], [40]), weights={"a": 1, "b": 1})
    _, cursor = drawn(config, 5)
    waiting = {config.shards[row.shard].name: row.ordinal for row in cursor.pool if row.shard == 1}
    items, after = drawn(replace(config, weights={"a": 1}), 20, cursor)
    assert waiting
    assert "b" in {source for source, _, _ in items}
    assert all(row.shard == 0 for row in after.pool)


def labels(n):
    return [(f"k{i}", {"png": tiny_image(14, 14 + 14 * (i % 3)), "cls": f"thing {i}".encode()}) for i in range(n)]


def test_the_template_for_a_label_changes_between_epochs():
    templates = ["a photo of {}.", "{} at night", "one {}"]
    config = small_config(shards_of([labels(9)], templates=templates))
    captions = {}
    for start in (StreamCursor(), StreamCursor()):
        stream = Stream(config, 0, start)
        for _ in range(30):
            for item in stream.next_pack()[0]:
                first = captions.setdefault((item.key, item.address.epoch), item.caption)
                assert first == item.caption, "another caption in the second run"
                assert first in [template.replace("{}", item.label) for template in templates]
    assert len({caption for (key, _), caption in captions.items() if key == "k3"}) == 3


def test_a_label_without_a_template_is_a_bad_sample_and_captions_take_precedence():
    both = [("c", {"png": tiny_image(14, 14), "txt": b"its own", "cls": b"x"}), *labels(1)]
    stream = Stream(small_config(shards_of([both])), 0, StreamCursor())
    items, bad = stream.next_pack()
    assert [item.caption for item in items] == ["its own"]
    assert set(bad) == {"no_caption"}
    stream = Stream(small_config(shards_of([both], templates=["some {}"])), 0, StreamCursor())
    assert {item.caption for item in stream.next_pack()[0]} == {"its own", "some thing 0"}


def test_a_stream_without_groups_is_an_error():
    with pytest.raises(DataError, match="none of the 0 shards has a readable video sample"):
        Stream(small_config(mixed([3]), modality="video"), 0, StreamCursor(places={"": ReadPosition(3)}))


def test_a_source_that_turns_out_to_lack_the_modality_is_left_out_also_after_a_resume():
    """The modalities of tars without a manifest are unknown. A resumed lane does not scan the source again."""
    videos = [(f"v{n}", {"mp4": b"not read", "txt": b"t"}) for n in range(9)]
    shards = shards_of([[sized_sample(f"a{n}", n) for n in range(40)], videos], None, sources=["a", "b"])
    config = small_config(shards, weights={"a": 1, "b": 3})
    whole, end = drawn(config, 30)
    assert {source for source, _, _ in whole} == {"a"}
    assert end.empty == ("b",)
    items, cursor = drawn(config, 7)
    saved = parse(json.loads(json.dumps(LaneCursor(0, 1, 0, "f", 0, {"image": cursor}).to_json())))
    shards[0].storage.hints.clear()
    more, again = drawn(config, 23, saved.streams["image"])
    assert items + more == whole
    assert again == end
    assert not any("m1" in hint for hint in shards[0].storage.hints)
    alone, _ = drawn(replace(config, weights={"a": 1}), 30)
    assert alone == whole
