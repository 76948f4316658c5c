"""Packs of grey items, for tests of plots."""

import torch

from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.geometry import PATCH


def grey_pack(*grids, frames=1, modality="image") -> PackedBatch:
    """A pack in which all pixels of item i are 50 * (i + 1) and its caption is "grey {that number}"."""
    values = [torch.full((frames * h * w * PATCH * PATCH * 3,), 50 * (i + 1)) for i, (_, h, w) in enumerate(grids)]
    n = len(grids)
    return PackedBatch(
        pixels=torch.cat([torch.zeros(0), *values]).to(torch.uint8),
        frames=rows([frames] * n),
        grid_thw=rows(list(grids), 3),
        token_ids=torch.zeros(n, 1, dtype=torch.int64),
        text_lengths=rows([1] * n),
        caption_ids=rows(list(range(n))),
        captions=[f"grey {50 * (i + 1)}" for i in range(n)],
        labels=[None] * n,
        sets=[None] * n,
        keys=[f"s/{i}" for i in range(n)],
        modality=modality,
        lane=0,
        index=0,
    )
