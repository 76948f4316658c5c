"""`cost_budget_tflops: auto`: packs of a step take about the same predicted time, on any number of ranks."""

import logging
import math
import random
from dataclasses import replace

import pytest

from tests.support.memory import shards_of, small_config, tiny_image
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.sampler import balance
from univitar_ds.data.sampler.cursor import LaneCursor, parse
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.data.sampler.packing import item_cost, predicted_time
from univitar_ds.data.sampler.stream_config import stream_config
from univitar_ds.geometry import Resolution

FLOPS = (2.0e9, 3.2e6)
"""Attention of an item of 256 tokens has 40 % of its other FLOPs."""
TIME = predicted_time(FLOPS, 2.0)
BUDGET, LANES, STEPS = 1024, 6, 30


def drawn_sides(rng):
    tokens = min(256, max(1, round(50 * math.exp(rng.gauss(0, 0.8)))))
    rows = math.isqrt(tokens)
    return rows, tokens // rows


def images_of(sides):
    content = [(str(n), {"png": tiny_image(14 * h, 14 * w), "txt": b"a"}) for n, (h, w) in enumerate(sides)]
    return shards_of([content[part::12] for part in range(12)])


@pytest.fixture(scope="module")
def shards():
    rng = random.Random(0)
    return images_of([drawn_sides(rng) for _ in range(2400)])


def config_of(shards, **changes):
    config = small_config(shards, lanes=LANES, token_budget=BUDGET, pool_samples=96, cost=TIME)
    size = replace(config.size, resolution=Resolution(1, 256, 14), most_tokens=BUDGET)
    return replace(config, **{"size": size, "balance_time": True, **changes})


def packs_of(config, steps=STEPS, cursors=None):
    """The lengths of the items of each pack by step and lane, and the cursors after them."""
    starts = cursors or [LaneCursor(lane, LANES, config.seed, "f") for lane in range(LANES)]
    lanes = [Lane({"image": config}, start) for start in starts]
    plans = [[lane.next_plan("image", step) for lane in lanes] for step in range(steps)]
    sizes = [[[sample.tokens for sample in plan.samples] for plan in step] for step in plans]
    return sizes, [plan.cursor for plan in plans[-1]]


def longest_over_mean(steps, coefficients):
    costs = [[sum(item_cost(one, coefficients) for one in pack) for pack in step] for step in steps]
    return sum(max(step) * len(step) / sum(step) for step in costs) / len(costs)


def test_packs_of_a_step_take_equal_time_and_are_full(shards):
    config = balance.balanced({"image": config_of(shards)})["image"]
    steps, _ = packs_of(config)
    assert longest_over_mean(steps, TIME) < 1.05
    assert longest_over_mean(steps, FLOPS) < 1.03
    assert longest_over_mean(steps, predicted_time(FLOPS, 2.7)) < 1.06  # on a GPU whose attention is slower
    assert sum(sum(pack) for step in steps for pack in step) / (BUDGET * LANES * STEPS) > 0.975
    without, _ = packs_of(config_of(shards))
    assert longest_over_mean(without, TIME) > 1.08


def test_the_budget_is_the_mean_cost_of_a_full_pack_with_some_headroom(shards):
    config = balance.balanced({"image": config_of(shards)})["image"]
    rng = random.Random(0)
    sizes = [rows * columns for rows, columns in (drawn_sides(rng) for _ in range(2400))]
    mean = sum(item_cost(one, TIME) for one in sizes) / sum(sizes)
    assert 0.95 < config.cost_budget / (balance.HEADROOM * mean * BUDGET) < 1.05  # known from 576 of them


def test_every_rank_finds_the_same_budget_and_a_resumed_run_the_one_it_had(shards):
    first = balance.balanced({"image": config_of(shards)})["image"]
    whole, _ = packs_of(first, 8)
    _, cursors = packs_of(first, 4)
    again = balance.balanced({"image": config_of(shards)})["image"]
    assert again.cost_budget == first.cost_budget
    rest, _ = packs_of(again, 4, [parse(cursor.to_json()) for cursor in cursors])
    assert rest == whole[4:]


def test_another_seed_reads_other_samples(shards):
    budgets = {balance.balanced({"image": config_of(shards, seed=seed)})["image"].cost_budget for seed in range(3)}
    assert len(budgets) == 3


def test_items_of_one_size_need_no_budget():
    config = config_of(images_of([(4, 4)] * 300))
    assert balance.balanced({"image": config})["image"].cost_budget is None


def test_a_given_budget_stays_and_nothing_is_read(shards):
    config = config_of(shards, balance_time=False, cost_budget=5.0)
    reads = shards[0].storage.ranges_read
    assert balance.balanced({"image": config}) == {"image": config}
    assert shards[0].storage.ranges_read == reads


def test_a_starved_source_is_still_named(caplog):
    """Without headroom for chance: a lane with few samples cannot fill its packs, whatever their cost."""
    rng = random.Random(1)
    config = balance.balanced({"image": config_of(images_of([drawn_sides(rng) for _ in range(48)]))})["image"]
    with caplog.at_level(logging.WARNING):
        packs_of(config, 2)
    assert any("data.lanes or token_budget" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("given", "weight"), [("auto", 3.0), (5.0, 1.0), (None, 1.0)])
def test_attention_is_weighted_only_where_time_balances(given, weight, shards):
    stage = StageConfig(name="s", samples=1, lr=1.0, cost_budget_tflops=given, patch_dropout=0.5)
    data = DataConfig(sources=[SourceConfig(path="none")], attention_cost=3.0)
    config = stream_config(shards, data=data, stage=stage, lanes=LANES, seed=0, cost=(8.0, 4.0))["image"]
    assert config.cost == (4.0, weight * 1.0)
    assert config.balance_time == (given == "auto")
    assert config.cost_budget == (5e12 if given == 5.0 else None)
