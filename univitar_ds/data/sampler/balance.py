"""The cost budget of `cost_budget_tflops: auto`, with which the packs of a step take about the same time.

All lanes need the same budget, whatever they have read. It follows from the mean cost of a token in the first samples
of the first lanes, so it is a pure function of the seed, the sources and the stage. Every rank, and a resumed
run, computes the same budget.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from univitar_ds.data.sampler.cursor import StreamCursor
from univitar_ds.data.sampler.lanes import Stream
from univitar_ds.data.sampler.packing import item_cost
from univitar_ds.data.sampler.stream_config import StreamConfig
from univitar_ds.geometry import Modality

_log = logging.getLogger(__name__)

SAMPLED_LANES = 8
"""Number of lanes whose first shuffle buffers are read. With 192 samples each, the mean cost of a token of photographs
is known to about 1 %."""
HEADROOM = 1.02
"""The budget as a multiple of the mean cost of a pack full of tokens. Both budgets are limits, so the longest pack of a
step exceeds the mean by little, whatever the number of lanes. Less headroom makes packs more equal and emptier
(measured: `benchmarks/LOG.md`)."""


def balanced(configs: Mapping[Modality, StreamConfig]) -> dict[Modality, StreamConfig]:
    """Returns the configurations, each with a cost budget if it balances time. Reads samples to compute it.

    Raises: DataError if samples cannot be read.
    """
    return {modality: _with_budget(config) if config.balance_time else config for modality, config in configs.items()}


def budget_of(tokens: Sequence[int], config: StreamConfig) -> float | None:
    """Returns the cost budget for items of these sizes; None if all have one size, and so the same cost."""
    if len(set(tokens)) < 2:
        return None
    return HEADROOM * config.token_budget * sum(item_cost(count, config.cost) for count in tokens) / sum(tokens)


def _with_budget(config: StreamConfig) -> StreamConfig:
    lanes = range(min(SAMPLED_LANES, config.lanes))
    tokens = [count for lane in lanes for count in Stream(config, lane, StreamCursor()).waiting_tokens()]
    budget = budget_of(tokens, config)
    if budget is not None:
        _log.info(
            "packs of %ss are balanced by time: at most %.4g TFLOP each, with attention weighted by "
            "data.attention_cost (from %s samples of %.0f tokens on average)",
            config.modality,
            budget / 1e12,
            f"{len(tokens):,}",
            sum(tokens) / len(tokens),
        )
    return replace(config, cost_budget=budget)
