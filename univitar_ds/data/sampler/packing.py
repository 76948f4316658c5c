"""Which of the waiting samples make the next pack. Pure functions of sizes; nothing is padded, cut or dropped.

The first sample always leaves. An exact subset sum over the others (reachable totals as the bits of one big integer)
fills the rest, to the token without a cost budget; with one, to the pair of tokens and cost that lets all packs take
the same time. Of the ways to get there it takes one with the earliest samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

TAKEN_AS_THEY_COME = (0.6, 0.3)
"""Share of the budgets that is filled in order before the search for a pair, which is the finer the less it has to
fill; the second is for sizes so alike that the first leaves no way to fill the rest."""
MOST_AS_THEY_COME = 0.85
"""A sample that would fill more waits for the search, which needs room."""
CLOSE = 0.005
"""A pack this near to its aim, in shares of the budgets, is not searched for again."""
MAX_COST_EXCESS_STDS = 0.5
"""How far a pack's cost per token may be above that of what waits, in standard deviations of what waits."""
MANY_ENOUGH = 1.06
"""So many times the tokens that what waits has for the cost budget are aimed at where that binds: packs are fuller, and
the expensive samples that this leaves meet cheap ones later (measured: `benchmarks/LOG.md`)."""
_NEGLIGIBLE = 1e-9
"""Costs that all together are a smaller share of their budget never bind; sums of the tiniest floats round to 0."""
_TOKEN_UNITS, _COST_UNITS = 64, 256
"""Resolution of the search for a pair; an item is rounded to it and the sums are then checked in full."""
_ROWS = 12
"""Different costs that are tried, nearest first; each with the two nearest numbers of tokens."""
_TRIES = 32
"""Pairs that are tried, nearest first."""


class Totals(NamedTuple):
    """Tokens and cost (FLOPs) of one or several samples, or limits on both."""

    tokens: float
    cost: float


@lru_cache(1 << 14)
def item_cost(tokens: int, coefficients: tuple[float, float]) -> float:
    """FLOPs of one item: a * tokens + b * tokens**2 (dense layers, attention)."""
    linear, square = coefficients
    return linear * tokens + square * tokens * tokens


def scale_for_dropout(coefficients: tuple[float, float], dropout: float) -> tuple[float, float]:
    """Coefficients by an item's whole tokens where the encoder sees all but `dropout` of them, to rounding."""
    linear, square = coefficients
    return (1 - dropout) * linear, (1 - dropout) ** 2 * square


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
    if cost_budget is None or sum(costs) <= _NEGLIGIBLE * cost_budget:
        return [0] + [index + 1 for index in _fullest(tokens[1:], token_budget - tokens[0])]
    budget = Totals(token_budget, cost_budget)
    items = [Totals(*item) for item in zip(tokens, costs, strict=True)]
    aim = _aim(items, budget)
    best: list[int] = []
    best_miss = math.inf
    for share in TAKEN_AS_THEY_COME:
        chosen = _towards(items, aim, budget, share)
        miss = _miss(_total(items, chosen), aim, budget)
        if miss < best_miss:
            best, best_miss = chosen, miss
        if miss < CLOSE:
            break
    return best


def _aim(items: Sequence[Totals], budget: Totals) -> Totals:
    """What the pack should come to so that the next ones can come to the same.

    Where what waits is expensive, the cost budget binds: the pack takes the waiting samples' tokens for that cost,
    and some more. Where it is cheap, the token budget binds; the pack then gets more than its share of expensive
    samples, within reason, because all lanes aim at the same cost budget and what waits in each differs by chance.
    """
    tokens, cost = _total(items, range(len(items)))
    mean = cost / tokens
    if mean * budget.tokens >= budget.cost:
        return Totals(min(budget.tokens, MANY_ENOUGH * budget.cost / mean), budget.cost)
    variance = sum(item.tokens * (item.cost / item.tokens - mean) ** 2 for item in items) / tokens
    return Totals(budget.tokens, min(budget.cost, (mean + MAX_COST_EXCESS_STDS * math.sqrt(variance)) * budget.tokens))


def _towards(items: Sequence[Totals], aim: Totals, budget: Totals, share: float) -> list[int]:
    """A pack within the budgets near `aim`, of which `share` is filled in order and the rest by search."""
    chosen, used = [0], items[0]
    for index, item in enumerate(items[1:], 1):
        if _filled(used, aim) >= share:
            break
        more = Totals(used.tokens + item.tokens, used.cost + item.cost)
        if _filled(more, aim) <= MOST_AS_THEY_COME:
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
    """Indices of the subset with the most tokens within what is left; exact."""
    fitting = [index for index, size in enumerate(tokens) if size <= left]
    if not fitting:
        return []
    weights = [tokens[index] for index in fitting]
    reach = _reachable(weights, (1 << (left + 1)) - 1, left)
    return [fitting[index] for index in _trace(weights, reach, reach[-1].bit_length() - 1)]


def _nearest(items: Sequence[Totals], left: Totals, aim: Totals, budget: Totals) -> list[int]:
    """Indices of the subset within what is left whose tokens and cost are nearest to `aim`, among those tried.

    A pair of totals is one bit of the big integer: a row of bits for each cost, in it a bit for each number of tokens.
    A row has twice the room, so that a sum beyond the last token falls into the unused half.
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
    # Rounding may leave none of those within the limits.
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
    """Reachable pairs (cost, tokens) in units: of the rows nearest to the goal the tokens nearest to it."""
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
    """Sums of subsets of the first 0, 1, 2, ... weights, as bits; ends with the first that reaches the goal."""
    reach = [1]
    for weight in weights:
        reach.append((reach[-1] | reach[-1] << weight) & mask)
        if reach[-1] >> goal & 1:
            break
    return reach


def _trace(weights: Sequence[int], reach: Sequence[int], target: int) -> list[int]:
    """The members of a subset with sum `target`; a later item is taken only where the earlier ones cannot do it."""
    subset = []
    for index in range(len(reach) - 2, -1, -1):
        if not reach[index] >> target & 1:
            subset.append(index)
            target -= weights[index]
    assert target == 0, target
    return subset[::-1]


_MASK = sum(((1 << (_TOKEN_UNITS + 1)) - 1) << (cost * 2 * _TOKEN_UNITS) for cost in range(_COST_UNITS + 1))
"""The bits of `_nearest` that mean something: rows up to the last cost, in each row up to the last token."""
