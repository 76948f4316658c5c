"""Helpers for tests of the loader: a small stage, and loaders with one lane or two."""

from __future__ import annotations

import torch

from univitar_ds.config.data import DataConfig, SourceConfig
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


def schedule(step: int) -> Modality:
    return "video" if step % 4 == 3 else "image"


def loader(folder, *, workers=0, lanes_of_rank=(0, 1), stage=STAGE, tokenizer=None, limits=None, **given) -> PackLoader:
    """A loader of a folder with two lanes, in which every fourth step has videos."""
    sources = [SourceConfig(path=str(folder))]
    data = DataConfig(sources=sources, workers=workers, pool_samples=24, **(limits or {}))
    about = {"count": given.pop("lanes", 2), "seed": 3}
    names = ("seed", "cursors", "first_step", "content", "warns")
    about |= {name: given.pop(name) for name in names if name in given}
    fields = {"modality_of": schedule, "context_length": 16, **given}
    return PackLoader(data, stage, LaneSet(lanes_of_rank, **about), tokenizer=tokenizer, **fields)


def take(steps: int, *args, **kwargs) -> list[list[PackedBatch]]:
    """The packs of the first `steps` steps of `loader`."""
    with loader(*args, **kwargs) as packs:
        return [next(packs) for _ in range(steps)]


def same(one: PackedBatch, other: PackedBatch) -> bool:
    """Whether two packs have the same tensors, texts, counts and cursor."""
    if (one.keys, one.captions, one.labels, one.bad) != (other.keys, other.captions, other.labels, other.bad):
        return False
    if (one.modality, one.lane, one.index, one.cursor) != (other.modality, other.lane, other.index, other.cursor):
        return False
    names = ("pixels", "frames", "grid_thw", "token_ids", "text_lengths", "caption_ids")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
