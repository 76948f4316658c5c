"""Decoded packs become batches; decoding failures are counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.memory import memory_shards, small_config
from univitar_ds import tokenization
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data import collate as collate_module
from univitar_ds.data.collate import DecodingMonitor, collate, tokenized
from univitar_ds.data.collate import decoded as decoded_plans
from univitar_ds.data.decoding.pipeline import DecodedPack
from univitar_ds.data.sampler.bad_samples import BadPolicy
from univitar_ds.data.sampler.cursor import LaneCursor, parse
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.errors import DataError


def packs(n, start=None):
    """The next `n` plans of one lane, from the beginning or from the cursor `start`."""
    lane = Lane({"image": small_config(memory_shards([40]))}, start or LaneCursor(0, 1, 0, "f"))
    first = 0 if start is None else start.packs
    return [lane.next_plan("image", first + index) for index in range(n)]


def decoded(plan, *failed):
    kept = [item for index, item in enumerate(plan.samples) if index not in failed]
    pixels = np.zeros(sum(item.tokens for item in kept) * 588, np.uint8)
    return DecodedPack(plan, pixels, [(index, "corrupt", f"item {index} is broken") for index in failed])


def test_decoding_failures_are_counted_in_the_cursor_of_the_pack():
    monitor = DecodingMonitor(BadPolicy())
    one, two = packs(2)
    first = collate(monitor.check(decoded(one, 1)), None)
    second = collate(monitor.check(decoded(two, 0, 1)), None)
    assert first.cursor.decoding == {"image": (len(one.samples), 1, 0 if len(one.samples) > 2 else 1)}
    assert second.cursor.decoding["image"][:2] == (len(one.samples) + len(two.samples), 3)
    assert second.bad["corrupt"] == 2
    assert [len(first), len(second)] == [len(one.samples) - 1, len(two.samples) - 2]


def test_captions_are_tokenized_while_planning_and_those_of_failed_items_are_omitted():
    (plan,) = packs(1)
    tokenizer = tokenization.train_tokenizer([item.caption for item in plan.samples], 300)
    (plan,) = tokenized(iter([plan]), tokenizer, 12)
    batch = collate(decoded(plan, 1), tokenizer)
    ids, lengths = tokenization.encode(tokenizer, batch.captions, 12)
    assert torch.equal(batch.token_ids, ids)
    assert torch.equal(batch.text_lengths, lengths)
    assert len(batch) == len(plan.samples) - 1


@pytest.mark.parametrize(
    ("asked", "prefetch_full_step", "ahead", "shared"),
    [(None, False, 3, 2), (None, True, 8, 0), (2, True, 2, 0), (5, False, 5, 0)],
)
def test_number_of_packs_decoded_ahead(monkeypatch, asked, prefetch_full_step, ahead, shared):
    made = []
    monkeypatch.setattr(collate_module, "Pipeline", lambda plans, jobs, config, lock=None: made.append(config))
    data = DataConfig(sources=[SourceConfig(path="x")], workers=1, prefetch_packs=asked)
    decoded_plans(
        lambda probe: iter([]), data, {"image": None}, 100, packs_of_step=8, prefetch_full_step=prefetch_full_step
    )
    assert [(config.prefetch_packs, config.max_held_slots, config.shared_slots) for config in made] == [
        (ahead, 8, shared)
    ]


def test_a_resumed_run_ends_at_the_same_bad_sample_as_an_uninterrupted_one():
    policy = BadPolicy(max_in_a_row=12, max_per_thousand=1000)

    def until_it_ends(plans, monitor):
        for plan in plans:
            try:
                monitor.check(decoded(plan, *range(len(plan.samples))))
            except DataError as error:
                return plan.index, str(error)
        pytest.fail("it did not end")

    whole = until_it_ends(packs(9), DecodingMonitor(policy))
    middle = DecodingMonitor(policy).check(decoded(packs(1)[0], *range(len(packs(1)[0].samples))))
    resumed = until_it_ends(packs(9, parse(middle.plan.cursor.to_json())), DecodingMonitor(policy))
    assert whole == resumed
    assert "13 samples in a row cannot be used" in whole[1]
    assert "m0/0-" in whole[1]


def test_failures_are_counted_per_lane_and_modality():
    policy = BadPolicy(max_in_a_row=1)
    monitor = DecodingMonitor(policy)
    plan = packs(1)[0]
    for lane in range(3):
        for modality in ("image", "video"):
            cursor = replace(plan.cursor, lane=lane)
            one = replace(plan, samples=plan.samples[:1], lane=lane, modality=modality, cursor=cursor)
            checked = monitor.check(decoded(one, 0))
            assert checked.plan.cursor.decoding[modality] == (1, 1, 1)
    with pytest.raises(DataError, match=r"lane 1, image, decoding: 2 samples in a row"):
        monitor.check(decoded(replace(plan, lane=1), 0))


def test_the_error_of_on_bad_fail_names_shard_key_and_byte():
    plan = packs(1)[0]
    item = plan.samples[1]
    with pytest.raises(DataError, match=f"{item.name} at byte {item.media_offset}: item 1 is broken"):
        DecodingMonitor(BadPolicy("fail")).check(decoded(plan, 1))


def test_downscaled_items_are_counted():
    plan = packs(1)[0]
    items = [replace(sample, downscaled=index % 2 == 0) for index, sample in enumerate(plan.samples)]
    assert collate(decoded(replace(plan, samples=items), 0), None).downscaled == (len(items) - 1) // 2
    assert collate(decoded(plan), None).downscaled == 0
