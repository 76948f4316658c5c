"""Chooses the samples of the next pack from the shuffle buffer: pure functions of sizes, without padding or truncation.

The pack always contains the first sample. The others are chosen by subset sum, with the reachable totals as the bits of
one big integer. Without a cost budget, the pack has the maximum number of tokens. With a cost budget, its tokens and
cost are near an aim with which all packs take about the same time. Of several solutions, one with the earliest samples
is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

FILLED_IN_ORDER = (0.6, 0.3)
"""Share of the aim that is filled in order before the search for a (tokens, cost) pair; the search is more precise
the less it has to fill. The second value is tried if the first does not lead to a result that is `CLOSE` to the aim."""
MOST_IN_ORDER = 0.85
"""The part that is filled in order has at most this share of the aim, because the search needs room."""
CLOSE = 0.005
"""Distance from the aim, in shares of the budgets, at which the search ends."""
MAX_COST_EXCESS_STDS = 0.5
"""Maximum excess of the aimed cost per token over the mean of the candidates, in their standard deviations."""
EXTRA_TOKENS = 1.06
"""If the cost budget binds, the pack aims at this multiple of the tokens that the budget allows at their mean cost.
Packs are fuller, and the expensive samples that remain are combined with cheap ones later (measured:
`benchmarks/LOG.md`)."""
_NEGLIGIBLE = 1e-9
"""A cost budget is ignored if all costs together are a smaller share of it: sums of tiny floats round to 0."""
_TOKEN_UNITS, _COST_UNITS = 64, 256
"""Resolution of the search for a pair. Items are rounded to units; the totals of the result are checked exactly."""
_ROWS = 12
"""Number of costs that are tried, nearest first, each with the two nearest numbers of tokens."""
_TRIES = 32
"""Number of pairs that are tried, nearest first."""


class Totals(NamedTuple):
    """Tokens and cost (FLOPs or predicted time) of one or several samples, or limits of tokens and cost."""

    tokens: float
    cost: float


@lru_cache(1 << 14)
def item_cost(tokens: int, coefficients: tuple[float, float]) -> float:
    """Returns the FLOPs of one item: a * tokens + b * tokens**2 (dense layers, attention)."""
    linear, square = coefficients
    return linear * tokens + square * tokens * tokens


def scale_for_dropout(coefficients: tuple[float, float], dropout: float) -> tuple[float, float]:
    """Returns the coefficients for an encoder that drops the share `dropout` of tokens, exact up to rounding."""
    linear, square = coefficients
    return (1 - dropout) * linear, (1 - dropout) ** 2 * square


def predicted_time(coefficients: tuple[float, float], attention_cost: float) -> tuple[float, float]:
    """Returns the coefficients of an item's time, in FLOPs of the encoder's other operations that take as long."""
    linear, square = coefficients
    return linear, attention_cost * square


def choose(
    tokens: Sequence[int], costs: Sequence[float], token_budget: int, cost_budget: float | None = None
) -> list[int]:
    """Chooses the samples of the next pack.

    Args:
        tokens, costs: tokens and cost of every candidate, in order of preference.
        token_budget: maximum number of tokens of a pack.
        cost_budget: maximum cost of a pack; None for no limit.
    Returns: ascending indices that include 0, so that no sample waits forever. The totals are within both budgets; if
    the first sample exceeds the cost budget, it is alone.
    """
    assert len(tokens) == len(costs) > 0, (len(tokens), len(costs))
    assert 0 < max(tokens) <= token_budget, f"an item of {max(tokens)} tokens in a budget of {token_budget}"
    if cost_budget is None or sum(costs) <= _NEGLIGIBLE * cost_budget:
        return [0] + [index + 1 for index in _fullest(tokens[1:], token_budget - tokens[0])]
    budget = Totals(token_budget, cost_budget)
    items = [Totals(*item) for item in zip(tokens, costs, strict=True)]
    aim = _aim(items, budget)
    best: list[int] = []
    best_miss = math.inf
    for share in FILLED_IN_ORDER:
        chosen = _towards(items, aim, budget, share)
        miss = _miss(_total(items, chosen), aim, budget)
        if miss < best_miss:
            best, best_miss = chosen, miss
        if miss < CLOSE:
            break
    return best


def _aim(items: Sequence[Totals], budget: Totals) -> Totals:
    """Returns the totals that the pack should have, so that later packs can have the same.

    If the candidates are expensive, the cost budget binds: the aim is slightly more tokens than they have on average
    for that cost. If they are cheap, the token budget binds: the aim is then a higher cost per token than their mean,
    up to a limit, because all lanes aim at the same cost and their candidates differ by chance.
    """
    tokens, cost = _total(items, range(len(items)))
    mean = cost / tokens
    if mean * budget.tokens >= budget.cost:
        return Totals(min(budget.tokens, EXTRA_TOKENS * budget.cost / mean), budget.cost)
    variance = sum(item.tokens * (item.cost / item.tokens - mean) ** 2 for item in items) / tokens
    return Totals(budget.tokens, min(budget.cost, (mean + MAX_COST_EXCESS_STDS * math.sqrt(variance)) * budget.tokens))


def _towards(items: Sequence[Totals], aim: Totals, budget: Totals, share: float) -> list[int]:
    """Returns a pack within the budgets near `aim`; `share` of it is filled in order and the rest by search."""
    chosen, used = [0], items[0]
    for index, item in enumerate(items[1:], 1):
        if _filled(used, aim) >= share:
            break
        more = Totals(used.tokens + item.tokens, used.cost + item.cost)
        if _filled(more, aim) <= MOST_IN_ORDER:
            chosen.append(index)
            used = more
    taken = set(chosen)
    left = Totals(budget.tokens - used.tokens, budget.cost - used.cost)
    rest = [
        index
        for index, item in enumerate(items)
        if index not in taken and item.tokens <= left.tokens and item.cost <= left.cost
    ]
    goal = Totals(aim.tokens - used.tokens, aim.cost - used.cost)
    more = _nearest([items[index] for index in rest], left, goal, budget)
    return sorted(chosen + [rest[index] for index in more])


def _filled(used: Totals, aim: Totals) -> float:
    return max(used.tokens / aim.tokens, used.cost / aim.cost)


def _miss(used: Totals, aim: Totals, budget: Totals) -> float:
    return abs(used.tokens - aim.tokens) / budget.tokens + abs(used.cost - aim.cost) / budget.cost


def _total(items: Sequence[Totals], indices: Iterable[int]) -> Totals:
    tokens = cost = 0.0
    for index in indices:
        tokens += items[index].tokens
        cost += items[index].cost
    return Totals(tokens, cost)


def _fullest(tokens: Sequence[int], left: int) -> list[int]:
    """Returns the indices of the subset with the maximum number of tokens up to `left`, exactly."""
    fitting = [index for index, size in enumerate(tokens) if size <= left]
    if not fitting:
        return []
    weights = [tokens[index] for index in fitting]
    reach = _reachable(weights, (1 << (left + 1)) - 1, left)
    return [fitting[index] for index in _trace(weights, reach, reach[-1].bit_length() - 1)]


def _nearest(items: Sequence[Totals], left: Totals, aim: Totals, budget: Totals) -> list[int]:
    """Returns indices of the subset within `left` whose tokens and cost are nearest to `aim`, among those tried.

    Each pair of totals is one bit of a big integer: a row of bits for each cost, with a bit for each number of tokens.
    Rows have twice the needed width, so that sums above the most tokens fall into the unused half.
    """
    if not items or left.cost <= 0:
        return []
    width = 2 * _TOKEN_UNITS
    per_token, per_cost = _TOKEN_UNITS / left.tokens, _COST_UNITS / left.cost
    weights = [round(item.cost * per_cost) * width + round(item.tokens * per_token) for item in items]
    goal = (_clipped(aim.cost * per_cost, _COST_UNITS), _clipped(aim.tokens * per_token, _TOKEN_UNITS))
    reach = _reachable(weights, _MASK, goal[0] * width + goal[1])
    pairs = sorted(
        (_miss(Totals(tokens / per_token, cost / per_cost), aim, budget), cost * width + tokens)
        for cost, tokens in _pairs(reach[-1], *goal)
    )
    subsets = [_trace(weights, reach, pair) for _, pair in pairs[:_TRIES]]
    # Because of rounding, all pairs may exceed the limits.
    subsets += [[], _fullest([item.tokens for item in items], left.tokens)]
    best: list[int] = []
    best_miss = math.inf
    for subset in subsets:
        total = _total(items, subset)
        miss = _miss(total, aim, budget)
        if total.tokens <= left.tokens and total.cost <= left.cost and miss < best_miss:
            best, best_miss = subset, miss
    return best


def _pairs(reachable: int, goal_cost: int, goal_tokens: int) -> Iterator[tuple[int, int]]:
    """Yields reachable pairs (cost, tokens) in units: in the rows nearest to the goal, the nearest tokens."""
    row_mask = (1 << (_TOKEN_UNITS + 1)) - 1
    rows = 0
    for cost in sorted(range(_COST_UNITS + 1), key=lambda cost: abs(cost - goal_cost)):
        row = reachable >> (cost * 2 * _TOKEN_UNITS) & row_mask
        if not row:
            continue
        below, above = row & ((1 << (goal_tokens + 1)) - 1), row >> goal_tokens
        if below:
            yield cost, below.bit_length() - 1
        if above:
            yield cost, goal_tokens + (above & -above).bit_length() - 1
        rows += 1
        if rows == _ROWS:
            return


def _clipped(value: float, most: int) -> int:
    return min(max(round(value), 0), most)


def _reachable(weights: Sequence[int], mask: int, goal: int) -> list[int]:
    """Returns the sums of subsets of the first 0, 1, 2, ... weights as bits, up to where the goal is reachable."""
    reach = [1]
    for weight in weights:
        reach.append((reach[-1] | reach[-1] << weight) & mask)
        if reach[-1] >> goal & 1:
            break
    return reach


def _trace(weights: Sequence[int], reach: Sequence[int], target: int) -> list[int]:
    """Returns the members of a subset with sum `target`, with a later item only if earlier items cannot reach it."""
    subset = []
    for index in range(len(reach) - 2, -1, -1):
        if not reach[index] >> target & 1:
            subset.append(index)
            target -= weights[index]
    assert target == 0, target
    return subset[::-1]


_MASK = sum(((1 << (_TOKEN_UNITS + 1)) - 1) << (cost * 2 * _TOKEN_UNITS) for cost in range(_COST_UNITS + 1))
"""The used bits of `_nearest`: rows up to the maximum cost, in each row up to the maximum tokens."""
