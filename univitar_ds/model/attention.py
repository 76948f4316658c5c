"""Attention over packed items: every item attends to itself, nothing is padded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.errors import ConfigError
from univitar_ds.geometry import cumulative

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Spans:
    """Where the items of a pack lie along its tokens.

    `lengths` and `max_length` stay on the host, so that nothing waits for the device; `cu_seqlens` (N + 1,)
    int32 lies where the tokens lie.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Spans:
        bounds = torch.tensor(cumulative(lengths), dtype=torch.int32)
        return cls(tuple(lengths), bounds.to(device, non_blocking=True))

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)


def attention(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, backend: str = "auto") -> Tensor:
    """Softmax attention of the queries of each item over the keys of the same item.

    Args:
        q: (Tq, H, K); k, v: (T, H, K).
        queries, keys: spans of the items in q and in k, v; the same number of items.
        backend: auto, flash (flash-attn), varlen (torch) or sdpa (torch, item by item).
    Returns: (Tq, H * K).
    Raises: ConfigError if `backend` cannot run here.
    """
    chosen = choose_backend(backend, q.device, q.dtype)
    if not keys.lengths or chosen == "sdpa":
        return _by_item(q, k, v, queries, keys)
    bounds = (queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length)
    if chosen == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(q, k, v, *bounds).flatten(1)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, *bounds).flatten(1)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that runs: `backend` itself, or for auto the fastest one that can run here."""
    able = ["sdpa"]
    if device.type == "cuda" and dtype in HALF:
        able = ["flash", "varlen", "sdpa"] if importlib.util.find_spec("flash_attn") else ["varlen", "sdpa"]
    if backend == "auto":
        return able[0]
    if backend not in able:
        raise ConfigError(
            f"model.attention {backend} cannot run on {device.type} in {str(dtype).removeprefix('torch.')}; "
            f"able here: {', '.join(able)}, or auto"
        )
    return backend


def _by_item(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans) -> Tensor:
    # An empty pack becomes one empty item, so that gradients still reach everything that made q, k and v.
    pieces = zip(
        q.split(queries.lengths or (0,)), k.split(keys.lengths or (0,)), v.split(keys.lengths or (0,)), strict=True
    )
    outputs = [
        F.scaled_dot_product_attention(*(piece.transpose(0, 1)[None] for piece in triple))[0].transpose(0, 1)
        for triple in pieces
    ]
    return torch.cat(outputs).flatten(1)
