"""Choosing a pack: never above the budgets, the oldest always leaves, nothing is lost, hardly any room is wasted."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from univitar_ds.data.packing import choose, item_cost

BUDGET = 1000
items = st.lists(st.integers(1, BUDGET), min_size=1, max_size=40)
costed = st.lists(st.tuples(st.integers(1, BUDGET), st.floats(0, 300)), min_size=1, max_size=30)


@given(items)
def test_a_pack_stays_within_the_token_budget_and_takes_the_first_along(tokens):
    chosen = choose(tokens, [0.0] * len(tokens), BUDGET)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert sum(tokens[index] for index in chosen) <= BUDGET


@given(costed)
def test_a_pack_stays_within_both_budgets_unless_its_only_item_cannot(pairs):
    tokens, costs = zip(*pairs, strict=True)
    chosen = choose(tokens, costs, BUDGET, 200.0)
    assert chosen[0] == 0
    assert sum(tokens[index] for index in chosen) <= BUDGET
    assert sum(costs[index] for index in chosen) <= 200.0 * (1 + 1e-9) or chosen == [0]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(60, 200))
def test_what_is_left_over_cannot_be_filled_better(tokens, budget):
    """Against all subsets: no other choice among what the ordered part left would have fitted more."""
    chosen = choose(tokens, [0.0] * len(tokens), budget)
    total, used, ordered = 0, set(), []
    for index, size in enumerate(tokens):
        if index and total >= 0.75 * budget:
            break
        if total + size <= budget:
            ordered.append(index)
            total += size
    used = set(ordered)
    assert used <= set(chosen)
    rest = [size for index, size in enumerate(tokens) if index not in used]
    sums = {sum(some) for n in range(len(rest) + 1) for some in itertools.combinations(rest, n)}
    best = max(value for value in sums if value <= budget - total)
    assert sum(tokens[index] for index in chosen) == total + best


@given(items, st.randoms(use_true_random=False))
def test_every_sample_leaves_exactly_once(tokens, shuffler):
    waiting = list(enumerate(tokens))
    left = []
    while waiting:
        chosen = set(choose([size for _, size in waiting], [0.0] * len(waiting), BUDGET))
        left += [waiting[index][0] for index in chosen]
        waiting = [entry for index, entry in enumerate(waiting) if index not in chosen]
        tail = waiting[1:]
        shuffler.shuffle(tail)
        waiting[1:] = tail
    assert sorted(left) == list(range(len(tokens)))


def stream_fill(coefficients=(0.0, 0.0), cost_budget=None, packs=150, seed=0):
    """Mean fill over packs from a pool of 192 pictures with the training range of the release."""
    rng = random.Random(seed)
    budget = 16384

    def size():
        return 64 * rng.randint(1, 9) * rng.randint(1, 10)

    pool, fills = [size() for _ in range(192)], []
    for _ in range(packs):
        costs = [item_cost(tokens, coefficients) for tokens in pool]
        chosen = set(choose(pool, costs, budget, cost_budget))
        by_tokens = sum(pool[index] for index in chosen) / budget
        by_cost = sum(costs[index] for index in chosen) / cost_budget if cost_budget else 0.0
        fills.append(max(by_tokens, by_cost))
        pool = [tokens for index, tokens in enumerate(pool) if index not in chosen]
        pool += [size() for _ in chosen]
    return sum(fills) / len(fills), min(fills)


def test_a_realistic_mix_fills_the_token_budget():
    mean, least = stream_fill()
    assert mean >= 0.999
    assert least >= 0.985


@pytest.mark.parametrize("share", [0.7, 1.0, 1.4])
def test_a_realistic_mix_fills_whichever_budget_binds(share):
    coefficients = (2.0e9, 1.0e5)
    typical = item_cost(1750, coefficients) * 16384 / 1750
    mean, least = stream_fill(coefficients, share * typical)
    assert mean >= 0.985
    assert least >= 0.95


def test_the_cost_of_attention_grows_with_the_square():
    assert item_cost(10, (3.0, 2.0)) == 3 * 10 + 2 * 100


def test_an_item_above_the_budget_is_a_fault_of_the_program():
    with pytest.raises(AssertionError):
        choose([11], [0.0], 10)


def test_an_item_above_the_cost_budget_travels_alone():
    assert choose([5, 1, 1], [9.0, 1.0, 1.0], 10, 8.0) == [0]
