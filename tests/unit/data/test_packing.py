"""Choosing a pack: never above the budgets, the oldest always leaves, nothing is lost, hardly any room is wasted."""

import itertools
import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from univitar_ds.data.packing import choose, item_cost

BUDGET = 1000
items = st.lists(st.integers(1, BUDGET), min_size=1, max_size=40)
costed = st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0, 300)), min_size=1, max_size=30)
COEFFICIENTS = (2.0e9, 1.0e5)


@given(items)
def test_a_pack_stays_within_the_token_budget_and_takes_the_first_along(tokens):
    chosen = choose(tokens, [0.0] * len(tokens), BUDGET)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(tokens[index] for index in chosen) <= BUDGET


@given(costed)
@example(pairs=[(1, 0.0), (1, 5e-324)])  # their mean rounds to 0
def test_a_pack_stays_within_both_budgets_unless_its_only_item_cannot(pairs):
    tokens, costs = zip(*pairs, strict=True)
    chosen = choose(tokens, costs, BUDGET, 200.0)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(tokens[index] for index in chosen) <= BUDGET
    assert sum(costs[index] for index in chosen) <= 200.0 * (1 + 1e-9) or chosen == [0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(60, 200))
def test_no_other_pack_with_the_first_sample_would_be_fuller(tokens, budget):
    chosen = choose(tokens, [0.0] * len(tokens), budget)
    first, *rest = tokens
    sums = {first + sum(some) for n in range(len(rest) + 1) for some in itertools.combinations(rest, n)}
    assert sum(tokens[index] for index in chosen) == max(value for value in sums if value <= budget)


def test_of_equally_full_packs_the_one_with_the_earliest_samples_leaves():
    assert choose([40, 10, 20, 30, 20, 60, 10], [0.0] * 7, 100) == [0, 1, 2, 3]
    assert choose([40, 20, 20, 40], [0.0] * 4, 100) == [0, 1, 3]


@given(items, st.sampled_from([None, 0.2, 1.0]), st.randoms(use_true_random=False))
def test_every_sample_leaves_exactly_once(tokens, share, shuffler):
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
    """A picture of the release's training range: sides divisible by 112 px."""
    return 64 * rng.randint(3, 9) * rng.randint(3, 10)


def log_normal(rng, most=8192):
    """Anything up to half the budget, mostly small."""
    while True:
        size = round(1500 * math.exp(rng.gauss(0, 0.8)))
        if 1 <= size <= most:
            return size


def alike(rng):
    """A picture shrunk to at most 144 tokens, as most are; times 8, so that 15 or 16 fit the budget."""
    return 8 * rng.choice([126] * 5 + [130] * 5 + [132] * 4 + [135, 140] * 2 + [144])


def stream(size, cost_budget=None, packs=80, seed=0, budget=16384):
    """(tokens, cost) of every pack out of a pool of 192 samples, and the longest wait in packs."""
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
        # Oldest first again: the order above was drawn for this pack alone.
        pool = sorted((entry for index, entry in enumerate(order) if index not in chosen), key=lambda entry: entry[1])
        pool += [(size(rng), number) for _ in chosen]
    return totals, longest


@pytest.mark.parametrize("size", [native, log_normal])
def test_a_realistic_mix_fills_the_token_budget_and_nobody_starves(size):
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
def test_with_a_cost_budget_the_packs_of_a_step_take_equally_long(size, share, most):
    """`share` is the cost budget over what a pack full of tokens costs on average; four lanes, 80 steps."""
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


def test_a_cost_budget_that_never_binds_wastes_hardly_any_tokens():
    totals, _ = stream(native, 2 * item_cost(16384, COEFFICIENTS))
    fills = [tokens / 16384 for tokens, _ in totals]
    assert sum(fills) / len(fills) >= 0.985
    assert max(fills) <= 1


def test_a_cost_budget_without_costs_does_not_bind():
    tokens = [300, 500, 200, 400]
    assert choose(tokens, [0.0] * 4, BUDGET, 1.0) == choose(tokens, [0.0] * 4, BUDGET)


def test_the_cost_of_attention_grows_with_the_square():
    assert item_cost(10, (3.0, 2.0)) == 3 * 10 + 2 * 100


def test_an_item_above_the_budget_is_a_fault_of_the_program():
    with pytest.raises(AssertionError):
        choose([11], [0.0], 10)


def test_an_item_above_the_cost_budget_travels_alone():
    assert choose([5, 1, 1], [9.0, 1.0, 1.0], 10, 8.0) == [0]
