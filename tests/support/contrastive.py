"""A small contrastive model with the real encoder and text tower, and packs for it."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.standin import Pack
from tests.support.teachers import drawn_pack
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import ModelConfig, TextConfig
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import build_text_tower

GRIDS = [[(1, 2, 3), (1, 4, 2)], [(1, 5, 2), (1, 2, 2)], [(1, 3, 3)], [(1, 4, 4), (1, 1, 2)]]
"""Grids (T, H, W) of the items in the pack of each lane."""


def small_model(**settings: Any) -> ContrastiveModel:
    """Returns a model with the same random weights at every call. Args: settings: more fields of `ModelConfig`."""
    text = TextConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=8)
    shape = EncoderConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = build_text_tower(text, vocab_size=50, eos_id=2, pad_id=0)
        config = ModelConfig(text=text, embed_dim=16, pool_heads=2, **settings)
        return ContrastiveModel(UniViTAR(shape), tower, config)


def captioned_pack(lane: int, seed: int) -> Pack:
    """Returns random images with the grids of a lane, each with a caption of 5 random tokens."""
    pixels, frames, grids = drawn_pack(GRIDS[lane], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (len(grids), 5), generator=generator)
    return Pack(pixels, frames, grids, ids, torch.full((len(grids),), 5), torch.arange(len(grids)), lane)
