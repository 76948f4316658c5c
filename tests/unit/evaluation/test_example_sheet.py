"""The sheet of examples: which items, in which order their tokens, in which colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.closeness import assert_sums_close
from tests.unit.evaluation.made import made, random_rows
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation import example_sheet
from univitar_ds.evaluation.example_sheet import (
    Kept,
    draw_sheet,
    keep_some,
    nearest_captions,
    token_features,
)
from univitar_ds.geometry import PATCH
from univitar_ds.kernels.reference import patchify


class Mean(nn.Module):
    """An encoder whose tokens are the first channel's mean of each patch, and nothing else."""

    def __init__(self, merge: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(spatial_merge_size=merge)

    def forward(self, pixels: torch.Tensor, grids: list, *, frames: list) -> torch.Tensor:
        values = patchify(pixels, frames, grids, self.config.spatial_merge_size) / 255
        means = values.view(len(values), 3, -1).mean(dim=2)
        return torch.cat([means, means.flip(1) ** 2], dim=1)


def _model(merge: int = 1) -> nn.Module:
    model = nn.Module()
    model.vision = Mean(merge)
    return model


def _item(grid: tuple[int, int, int], frames: int, key: str = "shard/0000") -> Kept:
    """The red of every patch is its number in raster order."""
    t, h, w = grid
    numbers = torch.arange(t * h * w, dtype=torch.uint8).view(t, h, w)
    frame = numbers.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    pixels = torch.zeros(frames, h * PATCH, w * PATCH, 3, dtype=torch.uint8)
    pixels[..., 0] = frame.repeat_interleave(frames // t, 0)
    return Kept(key, pixels, grid)


def _pack(captions: list[int], grids: list[tuple[int, int, int]], first: int) -> PackedBatch:
    count = len(captions)
    pixels = [torch.full((h * w * PATCH * PATCH * 3,), first + row) for row, (_, h, w) in enumerate(grids)]
    return PackedBatch(
        pixels=torch.cat(pixels).to(torch.uint8),
        frames=torch.ones(count, dtype=torch.int64),
        grid_thw=torch.tensor(grids),
        token_ids=torch.zeros(count, 1, dtype=torch.int64),
        text_lengths=torch.ones(count, dtype=torch.int64),
        caption_ids=torch.tensor(captions),
        captions=[str(caption) for caption in captions],
        labels=[None] * count,
        sets=[None] * count,
        keys=[f"shard/{first + row:04d}" for row in range(count)],
        modality="image",
        lane=0,
        index=0,
    )


@pytest.mark.numeric
@pytest.mark.parametrize(("grid", "frames", "merge"), [((1, 4, 6), 1, 1), ((1, 4, 6), 1, 2), ((2, 2, 4), 4, 2)])
def test_tokens_come_in_raster_order_whatever_the_merge(grid: tuple[int, int, int], frames: int, merge: int):
    tokens = token_features(_model(merge), _item(grid, frames))
    count = grid[0] * grid[1] * grid[2]
    assert_sums_close(tokens[:, 0] * 255, torch.arange(count), 3, "places")


def test_kept_items_have_their_own_pixels_and_different_captions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(example_sheet, "PER_PACK", 2)
    kept: list[Kept] = []
    packs = [_pack([7, 7, 8, 9], [(1, 2, 1), (1, 1, 1), (1, 1, 3), (1, 1, 1)], 10), _pack([8, 5], [(1, 1, 2)] * 2, 20)]
    assert list(keep_some(packs, kept)) == packs, "packs pass through unchanged"
    assert [item.key for item in kept] == ["shard/0010", "shard/0012", "shard/0021"]
    for item in kept:
        assert item.pixels.shape == (1, item.grid[1] * PATCH, item.grid[2] * PATCH, 3)
        assert item.pixels.unique().tolist() == [int(item.key[-4:])]


def test_nearest_captions_are_distinct_and_the_own_one_is_marked():
    rows = torch.eye(4)
    found = made(rows[[0, 0, 1, 2]], rows[[0, 0, 1, 2]], ["same", "same", "other", "third"])
    captions = nearest_captions(found, 1)
    assert next(caption for caption, _, _ in captions) == "same"
    assert len({caption for caption, _, _ in captions}) == 3
    assert [right for _, right, _ in captions] == [True, False, False]


def test_a_sheet_is_an_image_with_a_row_for_every_item(tmp_path: Path):
    kept = [_item((1, 3, 5), 1, "shard/0000"), _item((2, 4, 2), 4, "shard/0001")]
    rows = random_rows(2, 4)
    draw_sheet(_model(), kept, made(rows, rows, ["one", "two"]), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height > 2 * 150
        assert len(sheet.convert("RGB").getcolors(1 << 24)) > 20
