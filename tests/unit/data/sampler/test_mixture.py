"""Mixtures: shares that hold, an epoch of each source's own, and stages that hand over to one another."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.memory import memory_shards, shards_of, sized_sample, small_rules, tiny_image
from univitar_ds.data.sampler.cursor import LaneCursor, ReadPosition, StreamCursor, parse
from univitar_ds.data.sampler.lanes import LONG_WAIT, Stream
from univitar_ds.data.sampler.mixture import WeightedRoundRobin
from univitar_ds.data.shards.sources import WHOLE, ShardGroup, groups_of, shares_of
from univitar_ds.errors import DataError

weights = st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 100), min_size=1)


@given(weights, st.integers(1, 400))
def test_after_any_number_of_samples_every_source_has_had_its_share(weights, n):
    shares = shares_of(weights)
    turns, taken = WeightedRoundRobin(shares, {}), Counter()
    for _ in range(n):
        taken[turns.next()] += 1
        turns.taken()
    for name, share in shares.items():
        assert abs(taken[name] - Fraction(n * share, sum(shares.values()))) < 2
    assert sum(turns.credits.values()) == 0


@given(weights, st.integers(0, 50))
def test_turns_go_on_from_their_credits(weights, n):
    turns = WeightedRoundRobin(shares_of(weights), {})
    for _ in range(n):
        turns.taken()
    again = WeightedRoundRobin(shares_of(weights), json.loads(json.dumps(turns.credits)))
    for _ in range(20):
        assert again.next() == turns.next()
        again.taken(), turns.taken()


def test_shares_are_of_the_weights_above_zero():
    assert shares_of({"a": 3, "b": 0, "c": 1}) == {"a": 750_000, "c": 250_000}
    assert shares_of({"a": 1e-9, "b": 1}) == {"a": 1, "b": WHOLE}


def mixed(*counts_of_sources, modality="image", **told):
    """Shards of several sources, named a, b, ...; keys tell the shard."""
    names = [name for name, counts in zip("abcdef", counts_of_sources, strict=False) for _ in counts]
    flat = [count for counts in counts_of_sources for count in counts]
    return memory_shards(flat, modality, sources=names, **told)


def drawn(rules, packs, start=None, lane=0):
    """(source, key, epoch) of every item, and the cursor at the end."""
    stream = Stream(rules, lane, start or StreamCursor())
    items = [item for _ in range(packs) for item in stream.next_pack()[0]]
    return [(item.shard.source, item.key, item.address.epoch) for item in items], stream.cursor()


@pytest.mark.parametrize("lanes", [1, 4])
def test_weights_hold_within_one_percent_over_a_thousand_packs(lanes):
    weights = {"a": 5, "b": 2.5, "c": 0.5}
    rules = small_rules(mixed([60, 50], [40], [300]), lanes=lanes, weights=weights)
    items = [item for lane in range(lanes) for item in drawn(rules, 1000 // lanes, lane=lane)[0]]
    seen = Counter(source for source, _, _ in items)
    for name, weight in weights.items():
        assert abs(seen[name] / len(items) - weight / 8) < 0.01 * weight / 8 + 16 * lanes / len(items)
        assert abs(seen[name] / len(items) - weight / 8) < 0.01


@pytest.mark.parametrize(("weights", "told"), [({"a": 1, "b": 1}, True), ({"a": 40, "b": 1}, False)])
def test_a_source_too_small_for_its_weight_is_named_once(caplog, weights, told):
    """A pack holds a sample once, so four samples cannot be half of a pack of many."""
    rules = replace(small_rules(mixed([200], [4]), lanes=3, weights=weights), token_budget=100)
    for lane in range(3):
        drawn(rules, 30, lane=lane)
    messages = [record.getMessage() for record in caplog.records if "too few samples" in record.getMessage()]
    assert len(messages) == told
    assert not told or "because source b has too few samples in a lane for its weight; lower its weight" in messages[0]


def test_without_weights_every_sample_comes_once_an_epoch_of_all_sources_together():
    rules = small_rules(mixed([20, 20], [7]))
    items, cursor = drawn(rules, 60)
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
def test_every_source_has_epochs_of_its_own_in_which_each_sample_comes_once(counts, weights, lanes, resumed_after):
    if not all(map(sum, counts)):
        return
    rules = small_rules(mixed(*counts), lanes=lanes, weights=dict(zip("abc", weights, strict=True)))
    seen = Counter()
    for lane in range(lanes):
        stream = Stream(rules, lane, StreamCursor())
        for pack in range(1000):  # one sample of a heavy source lets hardly any other into the pool
            if pack == resumed_after:
                saved = LaneCursor(lane, lanes, 0, "f", 0, {"image": stream.cursor()}).to_json()
                stream = Stream(rules, lane, parse(json.loads(json.dumps(saved))).streams["image"])
            items, _ = stream.next_pack()
            assert len({item.key for item in items}) == len(items), "a pack holds a sample twice"
            seen.update((item.key, item.address.epoch) for item in items)
            cursor = stream.cursor()
            if pack > resumed_after and done(rules, cursor, 2):
                break
        assert done(rules, cursor, 2)
    expected = {f"{shard}-{i}" for shard, n in enumerate(n for some in counts for n in some) for i in range(n)}
    assert Counter({entry: n for entry, n in seen.items() if entry[1] < 2}) == Counter(
        {(key, epoch): 1 for key in expected for epoch in range(2)}
    )


@settings(max_examples=20, deadline=None)
@given(weights, st.integers(0, 12))
def test_a_mixture_goes_on_from_any_save_point_as_if_nothing_had_been(weights, before):
    rules = small_rules(mixed([20], [30], [25]), weights=weights)
    whole, end = drawn(rules, before + 8)
    first, cursor = drawn(rules, before)
    saved = LaneCursor(0, 1, 0, "f", 0, {"image": cursor}).to_json()
    rest, after = drawn(rules, 8, parse(json.loads(json.dumps(saved))).streams["image"])
    assert first + rest == whole
    assert after == end


def done(rules, cursor, epochs):
    """Whether nothing of the first epochs of any source is still to come."""
    return all(place.epoch >= epochs for place in cursor.places.values()) and all(
        row.epoch >= epochs for row in cursor.pool
    )


def test_a_source_without_the_modality_drops_out_and_the_others_share():
    images, videos, both = memory_shards([9, 9, 9], sources=["a", "b", "c"])
    shards = [images, replace(videos, modality="video"), replace(both, modality=None)]
    weights = {"a": 1, "b": 8, "c": 3}
    groups = {name: groups_of(shards, name, weights) for name in ("image", "video")}
    assert groups["image"] == [ShardGroup("a", 250_000, (0,)), ShardGroup("c", 750_000, (2,))]
    assert groups["video"] == [ShardGroup("b", 727_273, (1,)), ShardGroup("c", 272_727, (2,))]
    seen = Counter(source for source, _, _ in drawn(small_rules(shards, weights=weights), 40)[0])
    assert set(seen) == {"a", "c"}


def test_a_source_without_a_weight_or_with_weight_zero_is_not_read():
    rules = small_rules(mixed([30], [30], [30]), weights={"a": 1, "b": 0})
    assert {source for source, _, _ in drawn(rules, 40)[0]} == {"a"}


def test_a_source_of_which_nothing_can_be_read_is_named():
    shards = shards_of([[sized_sample("k", 3)], [("x", {"png": b"junk", "txt": b"t"})]], sources=["good", "broken"])
    with pytest.raises(DataError, match="none of the 1 shards of source broken has a readable image sample"):
        drawn(small_rules(shards, weights={"good": 1, "broken": 1}), 20)


def test_bad_samples_cost_a_source_nothing_of_its_share():
    junk = [(f"x{n}", {"png": b"junk", "txt": b"t"}) for n in range(2)]
    broken = [part for n in range(30) for part in ([*junk, sized_sample(f"b{n}", n)])]
    shards = shards_of([[sized_sample(f"a{n}", n) for n in range(30)], broken], sources=["a", "b"])
    seen = Counter(source for source, _, _ in drawn(small_rules(shards, weights={"a": 1, "b": 1}), 60)[0])
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
def test_when_weights_change_with_the_stage_no_sample_of_an_epoch_is_lost_or_doubled(stages, unweighted_first):
    rules = small_rules(mixed([15], [9, 8], [11]))
    items, cursor = drawn(rules, 4) if unweighted_first else ([], StreamCursor())
    first = cursor.places[""].epoch + 1 if unweighted_first else 0
    for weights, packs in [*stages, (STAGES[3], 80)]:
        more, cursor = drawn(replace(rules, weights=weights), packs, cursor)
        items += more
    for source, n in (("a", 15), ("b", 17), ("c", 11)):
        seen = Counter((epoch, key) for name, key, epoch in items if name == source and epoch >= first)
        begun = min(epoch for epoch, _ in seen)
        waiting = [row.epoch for row in cursor.pool if rules.shards[row.shard].source == source]
        finished = min([cursor.places[source].epoch, *waiting])
        whole = Counter({entry: times for entry, times in seen.items() if entry[0] < finished})
        assert finished > begun
        assert set(whole.values()) == {1}
        assert len(whole) == n * (finished - begun)


def test_a_stage_goes_on_where_the_last_one_with_the_source_was_and_forgets_no_source():
    rules = small_rules(mixed([40], [40]), weights={"a": 1, "b": 1})
    _, cursor = drawn(rules, 5)
    _, without = drawn(replace(rules, weights={"a": 1}), 5, cursor)
    assert without.places["b"] == cursor.places["b"]
    assert without.places["a"] > cursor.places["a"]
    _, together = drawn(replace(rules, weights={}), 1, without)
    assert together.places[""].epoch > max(place.epoch for place in without.places.values())
    assert {name: together.places[name] for name in "ab"} == without.places


@pytest.mark.parametrize("packs", [11, 15])
def test_a_source_that_a_later_stage_adds_comes_once_an_epoch_though_lanes_stand_at_different_ones(packs):
    rules = small_rules(mixed([50, 43], [40, 33]), lanes=4, weights={"a": 1})
    cursors = [drawn(rules, packs, lane=lane)[1] for lane in range(4)]
    later = replace(rules, weights={"b": 1})
    items = [item for lane, cursor in enumerate(cursors) for item in drawn(later, 12, cursor, lane)[0]]
    begun = {cursor.places["a"].epoch for cursor in cursors}
    first = min(epoch for source, _, epoch in items if source == "b")
    seen = Counter(key for source, key, epoch in items if (source, epoch) == ("b", first))
    assert len(begun) > 1
    assert set(seen.values()) == {1}
    assert len(seen) == 73


def fills(rules, packs, start=None, lane=0):
    stream = Stream(rules, lane, start or StreamCursor())
    drawn_packs = [stream.next_pack()[0] for _ in range(packs)]
    return [sum(item.tokens for item in pack) / rules.token_budget for pack in drawn_packs]


def test_a_stage_without_the_weights_of_the_last_one_fills_its_packs():
    rules = small_rules(mixed([200], [20]), weights={"a": 2, "b": 1})
    for packs in (10, 25, 40):
        _, cursor = drawn(rules, packs)
        assert min(fills(replace(rules, weights={}), 10, cursor)) > 0.9


def test_a_small_source_with_several_times_its_share_of_a_pack_leaves_packs_full():
    """Its straggler of two epochs ago leaves with the next pack, so that the source is read on."""
    rules = small_rules(mixed([400], [30]), weights={"a": 1, "b": 1}, pool_samples=192, token_budget=80)
    assert min(fills(rules, 200)) > 0.9


def test_the_straggler_of_a_starved_source_leaves_first_but_nobody_waits_for_it_for_ever():
    stream = Stream(small_rules(mixed([40], [40]), weights={"a": 3, "b": 1}), 0, StreamCursor())
    stream.next_pack()
    oldest, *_ = stream._candidates(None)
    starved = next(name for name in "ab" if name != stream._group_at(oldest))
    first, second, *rest = stream._candidates(starved)
    assert stream._group_at(first) == starved
    assert first == min(index for index in [first, second, *rest] if stream._group_at(index) == starved)
    assert second == oldest
    stream._packs += LONG_WAIT + 1
    assert stream._candidates(starved)[0] == oldest


def test_what_a_dropped_source_has_in_the_pool_still_leaves():
    rules = small_rules(mixed([40], [40]), weights={"a": 1, "b": 1})
    _, cursor = drawn(rules, 5)
    waiting = {rules.shards[row.shard].name: row.ordinal for row in cursor.pool if row.shard == 1}
    items, after = drawn(replace(rules, weights={"a": 1}), 20, cursor)
    assert waiting
    assert "b" in {source for source, _, _ in items}
    assert all(row.shard == 0 for row in after.pool)


def labels(n):
    return [(f"k{i}", {"png": tiny_image(14, 14 + 14 * (i % 3)), "cls": f"thing {i}".encode()}) for i in range(n)]


def test_a_label_alone_is_put_into_a_template_that_changes_from_epoch_to_epoch():
    templates = ["a photo of {}.", "{} at night", "one {}"]
    rules = small_rules(shards_of([labels(9)], templates=templates))
    captions = {}
    for start in (StreamCursor(), StreamCursor()):
        stream = Stream(rules, 0, start)
        for _ in range(30):
            for item in stream.next_pack()[0]:
                told = captions.setdefault((item.key, item.address.epoch), item.caption)
                assert told == item.caption, "another caption on the rerun"
                assert told in [template.replace("{}", item.label) for template in templates]
    assert len({caption for (key, _), caption in captions.items() if key == "k3"}) == 3


def test_a_label_alone_without_a_template_is_a_bad_sample_and_captions_come_before_templates():
    both = [("c", {"png": tiny_image(14, 14), "txt": b"its own", "cls": b"x"}), *labels(1)]
    stream = Stream(small_rules(shards_of([both])), 0, StreamCursor())
    items, bad = stream.next_pack()
    assert [item.caption for item in items] == ["its own"]
    assert set(bad) == {"no_caption"}
    stream = Stream(small_rules(shards_of([both], templates=["some {}"])), 0, StreamCursor())
    assert {item.caption for item in stream.next_pack()[0]} == {"its own", "some thing 0"}


def test_no_group_at_all_is_a_sentence():
    with pytest.raises(DataError, match="none of the 0 shards has a readable video sample"):
        Stream(small_rules(mixed([3]), modality="video"), 0, StreamCursor(places={"": ReadPosition(3)}))


def test_a_source_of_unknown_kind_that_lacks_the_modality_drops_out_when_that_is_found_and_stays_out():
    """Bare tars do not say what is in them. A resumed lane does not look again."""
    videos = [(f"v{n}", {"mp4": b"of no interest here", "txt": b"t"}) for n in range(9)]
    shards = shards_of([[sized_sample(f"a{n}", n) for n in range(40)], videos], None, sources=["a", "b"])
    rules = small_rules(shards, weights={"a": 1, "b": 3})
    whole, end = drawn(rules, 30)
    assert {source for source, _, _ in whole} == {"a"}
    assert end.empty == ("b",)
    items, cursor = drawn(rules, 7)
    saved = parse(json.loads(json.dumps(LaneCursor(0, 1, 0, "f", 0, {"image": cursor}).to_json())))
    shards[0].storage.hints.clear()
    more, again = drawn(rules, 23, saved.streams["image"])
    assert items + more == whole
    assert again == end
    assert not any("m1" in hint for hint in shards[0].storage.hints)
    alone, _ = drawn(replace(rules, weights={"a": 1}), 30)
    assert alone == whole
