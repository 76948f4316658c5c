"""Helpers for tests of the loader: a small stage, and a loader with one lane of one modality."""

from __future__ import annotations

import torch

from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.loader import LaneSet, PackLoader
from univitar_ds.geometry import Modality

STAGE = StageConfig(
    name="s",
    samples=100,
    image={"min_tokens": 4, "max_tokens": 40, "divisor_px": 14},
    video={"min_tokens": 8, "max_tokens": 60, "divisor_px": 14},
    video_ratio=0.25,
    video_frames=4,
    token_budget=300,
    lr=1e-3,
)


def only_lane(data: DataConfig, stage: StageConfig, modality: Modality) -> PackLoader:
    """A loader with one lane in which every step has `modality`; without a tokenizer."""
    return PackLoader(
        data,
        stage,
        LaneSet([0], 1, 0),
        modality_of=lambda step: modality,
        tokenizer=None,
        context_length=8,
    )


def same(one: PackedBatch, other: PackedBatch) -> bool:
    """Whether two packs have the same tensors, texts, counts and cursor."""
    if (one.keys, one.captions, one.labels, one.bad) != (other.keys, other.captions, other.labels, other.bad):
        return False
    if (one.modality, one.lane, one.index, one.cursor) != (other.modality, other.lane, other.index, other.cursor):
        return False
    names = ("pixels", "frames", "grid_thw", "token_ids", "text_lengths", "caption_ids")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
