"""The presets of the encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from univitar_ds.config.encoder import EncoderConfig

if TYPE_CHECKING:  # needs pydantic, which the encoder alone does not need
    from univitar_ds.config.model import ModelConfig

__all__ = ["PRESETS", "EncoderConfig", "compiles", "encoder_config"]

PRESETS = {
    "tiny": EncoderConfig(192, 7, 3, 768),
    "0.3b": EncoderConfig(1024, 24, 16, 4224),
    "0.6b": EncoderConfig(1280, 32, 16, 5184),
    "1b": EncoderConfig(1920, 32, 24, 7680),
}
"""Encoders by name. Parameters: tiny 3,344,064 (ours, for demonstrations and tests), 0.3b 309,885,952 (released),
0.6b 636,554,496 (published as 637M) and 1b 1,418,820,480; the shape of 1b is inferred from the published 1419M."""


def encoder_config(config: ModelConfig) -> EncoderConfig:
    """Returns the configuration of the encoder of a run that does not start from another model's shape."""
    named = config.encoder or "tiny"
    shape = PRESETS[named] if isinstance(named, str) else EncoderConfig(**named.model_dump())
    return dataclasses.replace(shape, initializer_factor=config.layer_scale_init)


def compiles(config: ModelConfig) -> bool:
    """Returns whether a run on a CPU compiles its token-wise operations.

    "auto" compiles 0.3b and larger encoders: compilation takes about half a minute once and seconds at later launches,
    which these encoders save within about ten packs. `tiny` would need hundreds of packs (benchmarks/LOG.md).
    """
    return config.compile == "on" or (config.compile == "auto" and encoder_config(config).hidden_size >= 1024)
