"""Attention of transformers' models over the items of a pack, through the encoder's dispatch (`blocks.attention`).

transformers can call a registered function for the attention of its models. With the function of this module, items of
different lengths run as one row of tokens without padding. The code of the models needs no change, since everything
else in their blocks works token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from univitar_ds.model.blocks.attention import CuSeqlens, attention, choose_backend
from univitar_ds.model.libraries import working_imports

_NAME = "univitar_packed"
"""The name of the attention function in transformers, which adds no mask for names that it does not know."""
_items: ContextVar[tuple[CuSeqlens, bool]] = ContextVar("_items")


def can_pack(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether a model of transformers with this configuration should run packed.

    Packing is faster if one call computes the attention of all items. Otherwise, as on the CPU, each block needs a
    call for each item, and batches of padded or equally long items are faster.
    """
    width = config.hidden_size // config.num_attention_heads
    dropped = getattr(config, "attention_dropout", 0.0) or getattr(config, "attention_probs_dropout_prob", 0.0)
    return not dropped and choose_backend("auto", device, dtype, width) != "sdpa"


@contextmanager
def packed(model: nn.Module, items: CuSeqlens, *, causal: bool = False) -> Iterator[None]:
    """Restricts the attention of `model` to the tokens of the same item while the body runs.

    In the body, `model` is called with the tokens of all items in order, as (1, T, D) or (T, 1, D).
    Args: causal: whether a token attends only to itself and earlier tokens of its item.
    """
    with working_imports("transformers"):
        from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attend)
    config = model.config
    before, config._attn_implementation = config._attn_implementation, _NAME
    token = _items.set((items, causal))
    try:
        yield
    finally:
        _items.reset(token)
        config._attn_implementation = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Computes the attention of a block. Args: query, key, value: (B, H, L, K) with B or L equal to 1.

    Returns: (B, L, H, K), and no weights."""
    batch, heads, length, width = query.shape
    assert mask is None, "a mask beside the items"
    assert scaling == width**-0.5, f"{type(module).__name__} scales by {scaling}, not by {width}**-0.5"
    items, causal = _items.get()
    rows = [part.transpose(1, 2).reshape(batch * length, heads, width) for part in (query, key, value)]
    return attention(*rows, items, items, causal=causal).view(batch, length, heads, width), None
