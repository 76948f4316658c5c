"""FLOPs of an item. A multiplication and an addition count one each; norms and rotary positions are left out."""

from __future__ import annotations

from collections.abc import Sequence

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import PATCH, TUBELET, token_count

BACKWARD = 2
"""FLOPs of the backward pass per FLOP of the forward pass: gradients of the input and of the weight."""


def flops_per_item(config: EncoderConfig, grid_thw: Sequence[int]) -> int:
    """Returns the FLOPs of the encoder's forward pass over one item with the grid (t, h, w)."""
    linear, square = _forward(config)
    tokens = token_count(grid_thw)
    return linear * tokens + square * tokens**2


def cost_coefficients(config: EncoderConfig) -> tuple[float, float]:
    """Returns (a, b): forward plus backward FLOPs of a pack are a * tokens + b * sum over items of tokens^2.

    Recomputation by activation checkpointing is not counted, as is usual for MFU.
    """
    linear, square = _forward(config)
    return float((1 + BACKWARD) * linear), float((1 + BACKWARD) * square)


def _forward(config: EncoderConfig) -> tuple[int, int]:
    d = config.hidden_size
    patch = d * 3 * TUBELET * PATCH * PATCH
    block = 4 * d * d + 3 * d * config.inner_width
    return 2 * (patch + config.num_hidden_layers * block), 4 * d * config.num_hidden_layers
