"""Choosing packs: within the budgets, with the first sample, without losing samples, and nearly full."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.memory import shards_of, small_config, tiny_image
from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.data.sampler.lanes import Lane
from univitar_ds.data.sampler.packing import choose, item_cost
from univitar_ds.data.shards.sources import EVERYTHING
from univitar_ds.geometry import Resolution

BUDGET = 1000
items = st.lists(st.integers(1, BUDGET), min_size=1, max_size=40)
costed = st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0, 300)), min_size=1, max_size=30)
COEFFICIENTS = (2.0e9, 1.0e5)


@given(items)
def test_a_pack_is_within_the_token_budget_and_contains_the_first_sample(tokens):
    chosen = choose(tokens, [0.0] * len(tokens), BUDGET)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(tokens[index] for index in chosen) <= BUDGET


@given(costed)
@example(pairs=[(1, 0.0), (1, 5e-324)])  # their mean rounds to 0
@example(pairs=[(1, 0.0), (1, 0.0), (4, 201.0), (1000, 0.0)])  # costs differ so much that the aim might pass the budget
def test_a_pack_is_within_both_budgets_unless_its_only_item_exceeds_one(pairs):
    tokens, costs = zip(*pairs, strict=True)
    chosen = choose(tokens, costs, BUDGET, 200.0)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(tokens[index] for index in chosen) <= BUDGET
    assert sum(costs[index] for index in chosen) <= 200.0 * (1 + 1e-9) or chosen == [0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(60, 200))
def test_no_other_pack_with_the_first_sample_has_more_tokens(tokens, budget):
    chosen = choose(tokens, [0.0] * len(tokens), budget)
    first, *rest = tokens
    sums = {first + sum(some) for n in range(len(rest) + 1) for some in itertools.combinations(rest, n)}
    assert sum(tokens[index] for index in chosen) == max(value for value in sums if value <= budget)


def test_of_equally_full_packs_the_one_with_the_earliest_samples_is_chosen():
    assert choose([40, 10, 20, 30, 20, 60, 10], [0.0] * 7, 100) == [0, 1, 2, 3]
    assert choose([40, 20, 20, 40], [0.0] * 4, 100) == [0, 1, 3]


@given(items, st.sampled_from([None, 0.2, 1.0]), st.randoms(use_true_random=False))
def test_every_sample_is_in_exactly_one_pack(tokens, share, shuffler):
    cost_budget = None if share is None else share * item_cost(BUDGET, (1.0, 1.0))
    waiting = list(enumerate(tokens))
    left = []
    while waiting:
        sizes = [size for _, size in waiting]
        chosen = set(choose(sizes, [item_cost(size, (1.0, 1.0)) for size in sizes], BUDGET, cost_budget))
        left += [waiting[index][0] for index in chosen]
        waiting = [entry for index, entry in enumerate(waiting) if index not in chosen]
        tail = waiting[1:]
        shuffler.shuffle(tail)
        waiting[1:] = tail
    assert sorted(left) == list(range(len(tokens)))


def native(rng):
    """Tokens of an image within the training range of the release: sides divisible by 112 px."""
    return 64 * rng.randint(3, 9) * rng.randint(3, 10)


def log_normal(rng, most=8192):
    """Tokens of an image, up to half the budget and mostly few."""
    while True:
        size = round(1500 * math.exp(rng.gauss(0, 0.8)))
        if 1 <= size <= most:
            return size


def alike(rng):
    """Tokens of an image resized to at most 144 tokens, as most are; times 8, so that 15 or 16 fit the budget."""
    return 8 * rng.choice([126] * 5 + [130] * 5 + [132] * 4 + [135, 140] * 2 + [144])


def stream(size, cost_budget=None, packs=80, seed=0, budget=16384):
    """(tokens, cost) of every pack from a shuffle buffer of 192 samples, and the longest wait in packs."""
    rng = random.Random(seed)
    pool = [(size(rng), 0) for _ in range(192)]
    totals, longest = [], 0
    for number in range(packs):
        first, *others = pool
        order = [first, *rng.sample(others, len(others))]
        costs = [item_cost(tokens, COEFFICIENTS) for tokens, _ in order]
        chosen = set(choose([tokens for tokens, _ in order], costs, budget, cost_budget))
        totals.append((sum(order[index][0] for index in chosen), sum(costs[index] for index in chosen)))
        longest = max([longest, *(number - order[index][1] for index in chosen)])
        # Sort by age again: the order above was random for this pack.
        pool = sorted((entry for index, entry in enumerate(order) if index not in chosen), key=lambda entry: entry[1])
        pool += [(size(rng), number) for _ in chosen]
    return totals, longest


@pytest.mark.parametrize("size", [native, log_normal])
def test_packs_of_a_realistic_mix_are_full_and_no_sample_waits_too_long(size):
    totals, longest = stream(size)
    fills = [tokens / 16384 for tokens, _ in totals]
    assert sum(fills) / len(fills) >= 0.9999
    assert min(fills) >= 0.999
    assert longest < 192


@pytest.mark.parametrize(
    ("size", "share", "most"),
    [
        (native, 0.7, 0.01),
        (native, 1.0, 0.01),
        (log_normal, 0.7, 0.01),
        (log_normal, 0.9, 0.01),
        (log_normal, 1.0, 0.03),
        (alike, 1.0, 0.01),
    ],
)
def test_with_a_cost_budget_the_packs_of_a_step_have_equal_cost(size, share, most):
    """`share` is the cost budget over the mean cost of a pack with the full token budget; four lanes, 80 steps."""
    rng = random.Random(5)
    sizes = [size(rng) for _ in range(20_000)]
    full = 16384 * sum(item_cost(tokens, COEFFICIENTS) for tokens in sizes) / sum(sizes)
    lanes = [stream(size, share * full, seed=lane)[0] for lane in range(4)]
    steps = [[cost for _, cost in packs] for packs in zip(*lanes, strict=True)]
    imbalance = [max(costs) * len(costs) / sum(costs) - 1 for costs in steps]
    assert sum(imbalance) / len(imbalance) <= most
    used = [cost / (share * full) for costs in steps for cost in costs]
    assert max(used) <= 1
    assert sum(used) / len(used) >= 0.96


def first_packs(size, share):
    """(tokens, costs, chosen) of 30 buffers; the cost budget is `share` of a full pack's cost at the buffer's mean."""
    for seed in range(30):
        rng = random.Random(seed)
        tokens = [size(rng) for _ in range(192)]
        costs = [item_cost(count, COEFFICIENTS) for count in tokens]
        yield tokens, costs, choose(tokens, costs, 16384, share * sum(costs) / sum(tokens) * 16384)


@pytest.mark.parametrize("size", [native, log_normal])
def test_if_the_candidates_are_cheap_the_cost_per_token_of_a_pack_is_moderately_above_their_mean(size):
    """On average half a standard deviation of the candidates' cost per token."""
    excesses = []
    for tokens, costs, chosen in first_packs(size, 1.1):
        mean = sum(costs) / sum(tokens)
        spread = math.sqrt(sum(n * (cost / n - mean) ** 2 for n, cost in zip(tokens, costs, strict=True)) / sum(tokens))
        excesses.append((sum(costs[i] for i in chosen) / sum(tokens[i] for i in chosen) - mean) / spread)
    assert 0.25 <= sum(excesses) / len(excesses) <= 0.75


@pytest.mark.parametrize("size", [native, log_normal])
def test_if_the_candidates_are_expensive_a_pack_has_slightly_more_tokens_than_their_mean_cost_gives(size):
    """One twentieth more tokens for the cost budget."""
    ratios = [sum(tokens[i] for i in chosen) / (0.9 * 16384) for tokens, _, chosen in first_packs(size, 0.9)]
    assert 1.03 <= sum(ratios) / len(ratios) <= 1.08


def test_packs_are_nearly_full_with_a_cost_budget_that_never_binds():
    totals, _ = stream(native, 2 * item_cost(16384, COEFFICIENTS))
    fills = [tokens / 16384 for tokens, _ in totals]
    assert sum(fills) / len(fills) >= 0.985
    assert max(fills) <= 1


def test_a_cost_budget_without_costs_does_not_bind():
    tokens = [300, 500, 200, 400]
    assert choose(tokens, [0.0] * 4, BUDGET, 1.0) == choose(tokens, [0.0] * 4, BUDGET)


def test_the_cost_of_attention_grows_with_the_square():
    assert item_cost(10, (3.0, 2.0)) == 3 * 10 + 2 * 100


@pytest.mark.skipif(not __debug__, reason="python -O leaves asserts out")
def test_an_item_above_the_token_budget_is_an_assertion_error():
    with pytest.raises(AssertionError):
        choose([11], [0.0], 10)


def test_an_item_above_the_cost_budget_has_a_pack_to_itself():
    assert choose([5, 1, 1], [9.0, 1.0, 1.0], 10, 8.0) == [0]


@pytest.fixture(scope="module")
def images():
    """The tokens of 1600 images, the `log_normal` mix divided by 32, and 16 shards of them."""
    rng = random.Random(0)
    tokens, samples = [], []
    for number in range(1600):
        wanted = max(log_normal(rng) // 32, 1)
        rows = math.isqrt(wanted)
        columns = wanted // rows
        tokens.append(rows * columns)
        samples.append((str(number), {"png": tiny_image(14 * rows, 14 * columns), "txt": b"a caption"}))
    return tokens, shards_of([samples[shard::16] for shard in range(16)])


def packs_of_two_epochs(config, number):
    """The items of each pack of a lane until all samples of its first two epochs are in packs."""
    lane = Lane({"image": config}, LaneCursor(number, config.lanes, config.seed, "f"))
    for index in itertools.count():
        plan = lane.next_plan("image", index)
        yield plan.samples
        stream = plan.cursor.streams["image"]
        if min([stream.places[EVERYTHING].epoch, *(row.epoch for row in stream.pool)]) >= 2:
            return


@pytest.mark.parametrize("share", [None, 1.0, 0.9])
def test_lanes_over_shards_yield_full_packs_of_equal_cost_with_every_sample_once_per_epoch(images, share):
    """As in the tests above, with four lanes; `share` as above."""
    sizes, shards = images
    cost = (COEFFICIENTS[0], 32 * COEFFICIENTS[1])
    full = 512 * sum(item_cost(tokens, cost) for tokens in sizes) / sum(sizes)
    config = small_config(shards, lanes=4, token_budget=512, pool_samples=96, cost=cost)
    size = replace(config.size, resolution=Resolution(1, 256, 14), most_tokens=512)
    config = replace(config, size=size, cost_budget=None if share is None else share * full)
    lanes = [list(packs_of_two_epochs(config, number)) for number in range(4)]

    seen = Counter((item.key, item.address.epoch) for lane in lanes for items in lane for item in items)
    first_two = {entry: times for entry, times in seen.items() if entry[1] < 2}
    assert first_two == {(str(number), epoch): 1 for number in range(len(sizes)) for epoch in range(2)}

    tokens = [sum(item.tokens for item in items) for lane in lanes for items in lane]
    assert 0.985 * (share or 1) <= sum(tokens) / len(tokens) / 512
    assert max(tokens) <= 512
    costs = [[sum(item_cost(item.tokens, cost) for item in items) for items in lane] for lane in lanes]
    if share is not None:  # otherwise the imbalance is about eight times larger
        assert max(map(max, costs)) <= config.cost_budget
        imbalance = [max(step) * len(step) / sum(step) - 1 for step in zip(*costs, strict=False)]
        assert sum(imbalance) / len(imbalance) <= 0.01
