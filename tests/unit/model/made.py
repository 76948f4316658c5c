"""Small encoders and packs for the tests of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.geometry import token_count
from univitar_ds.model.encoder import UniViTAR

GRIDS = [[1, 4, 6], [2, 2, 4], [1, 2, 2], [1, 6, 2]]


def small_config(**changes) -> EncoderConfig:
    return EncoderConfig(**{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
                            "intermediate_size": 96, **changes})  # fmt: skip


def small_encoder(seed: int = 0, **changes) -> UniViTAR:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UniViTAR(small_config(**changes))


def drawn_patches(grids, seed: int = 0) -> Tensor:
    total = sum(token_count(grid) for grid in grids)
    return torch.randn(total, 1176, generator=torch.Generator().manual_seed(seed))
