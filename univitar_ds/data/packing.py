"""Which of the waiting samples make the next pack. Pure functions of sizes; nothing is padded, cut or dropped.

First the samples are taken as they come until three quarters of the budget are full, then an exact subset sum over
the rest (reachable totals as the bits of one big integer) fills what is left, to the token where that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

TAKEN_AS_THEY_COME = 0.75
"""Share of the budget that is filled in order; the rest is what the exact search chooses for."""
_COST_STEPS = 4096
"""Resolution of the cost budget in the exact search; a cost is rounded up to it, so the budget always holds."""
_TRIES = 64
"""Totals that are tried, best first, before the search is content with the best found."""


def item_cost(tokens: int, coefficients: tuple[float, float]) -> float:
    """FLOPs of one item: a * tokens + b * tokens**2 (dense layers, attention)."""
    linear, square = coefficients
    return linear * tokens + square * tokens * tokens


def choose(
    tokens: Sequence[int], costs: Sequence[float], token_budget: int, cost_budget: float | None = None
) -> list[int]:
    """Indices of the samples that make the next pack, in the order given.

    Args: tokens and cost of every waiting sample, in the order in which they should leave; the most tokens of a
    pack; the most cost of a pack (None: no limit).
    Returns: at least the first sample, so that nothing waits for ever. The totals stay within both budgets,
    unless the first sample alone exceeds the cost budget: it then travels alone.
    """
    assert len(tokens) == len(costs) > 0, (len(tokens), len(costs))
    assert 0 < max(tokens) <= token_budget, f"an item of {max(tokens)} tokens in a budget of {token_budget}"
    limit = math.inf if cost_budget is None else cost_budget
    chosen, tokens_used, cost_used = _in_order(tokens, costs, token_budget, limit)
    taken = set(chosen)
    rest = [index for index in range(len(tokens)) if index not in taken]
    more = _exact(
        [tokens[index] for index in rest],
        [costs[index] for index in rest],
        token_budget - tokens_used,
        limit - cost_used,
    )
    return sorted(chosen + [rest[index] for index in more])


def _in_order(
    tokens: Sequence[int], costs: Sequence[float], token_budget: int, cost_budget: float
) -> tuple[list[int], int, float]:
    chosen, tokens_used, cost_used = [0], tokens[0], costs[0]
    for index in range(1, len(tokens)):
        if max(tokens_used / token_budget, cost_used / cost_budget) >= TAKEN_AS_THEY_COME:
            break
        if tokens_used + tokens[index] <= token_budget and cost_used + costs[index] <= cost_budget:
            chosen.append(index)
            tokens_used += tokens[index]
            cost_used += costs[index]
    return chosen, tokens_used, cost_used


def _exact(tokens: Sequence[int], costs: Sequence[float], tokens_left: int, cost_left: float) -> list[int]:
    """The fullest subset within both limits.

    With one limit the answer is exact. With two, the fullest totals of each are tried in turn until one subset
    fits the other limit too; which limit binds differs from pack to pack.
    """
    if tokens_left <= 0 or cost_left <= 0:
        return []
    if math.isinf(cost_left):
        return next(_subsets(tokens, tokens_left), [])
    step = cost_left / _COST_STEPS
    units = [max(1, math.ceil(cost / step)) for cost in costs]
    best: list[int] = []
    best_fill = 0.0
    for weights, total in ((tokens, tokens_left), (units, _COST_STEPS)):
        for subset in _subsets(weights, total):
            token_sum, cost_sum = sum(tokens[i] for i in subset), sum(costs[i] for i in subset)
            fill = max(token_sum / tokens_left, cost_sum / cost_left)
            if token_sum <= tokens_left and cost_sum <= cost_left:
                if fill > best_fill:
                    best, best_fill = subset, fill
                break
    return best


def _subsets(weights: Sequence[int], total: int):
    """Subsets whose sum is the largest that fits `total`, then the second largest, and so on, at most `_TRIES`."""
    mask = (1 << (total + 1)) - 1
    reach = [1]
    for weight in weights:
        reach.append((reach[-1] | reach[-1] << weight) & mask if weight <= total else reach[-1])
    sums = reach[-1]
    for _ in range(_TRIES):
        target = sums.bit_length() - 1
        if target <= 0:
            return
        yield _trace(weights, reach, target)
        sums ^= 1 << target


def _trace(weights: Sequence[int], reach: Sequence[int], target: int) -> list[int]:
    """The members of a subset with sum `target`; a later item is taken only where the earlier ones cannot do it."""
    subset = []
    for index in range(len(weights) - 1, -1, -1):
        if not reach[index] >> target & 1:
            subset.append(index)
            target -= weights[index]
    assert target == 0, target
    return subset[::-1]
