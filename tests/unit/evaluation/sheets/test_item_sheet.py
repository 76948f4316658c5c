"""The sheet of examples: its items, the order of their tokens, and their colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from tests.support.closeness import assert_sums_close
from tests.unit.evaluation.made import made
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation.sheets import item_sheet
from univitar_ds.evaluation.sheets.item_sheet import Kept, draw_sheet, keep_some, token_features
from univitar_ds.geometry import PATCH
from univitar_ds.kernels.reference import patchify
from univitar_ds.viz import cards


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


def _item(grid: tuple[int, int, int], frames: int, row: int = 0) -> Kept:
    """The red of every patch is its number in raster order."""
    t, h, w = grid
    numbers = torch.arange(t * h * w, dtype=torch.uint8).view(t, h, w)
    frame = numbers.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    pixels = torch.zeros(frames, h * PATCH, w * PATCH, 3, dtype=torch.uint8)
    pixels[..., 0] = frame.repeat_interleave(frames // t, 0)
    return Kept(row, pixels, grid)


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
def test_tokens_are_in_raster_order_with_any_merge(grid: tuple[int, int, int], frames: int, merge: int):
    tokens = token_features(_model(merge), _item(grid, frames))
    count = grid[0] * grid[1] * grid[2]
    assert_sums_close(tokens[:, 0] * 255, torch.arange(count), 3, "places")


def test_kept_items_have_their_own_pixels_and_different_captions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(item_sheet, "PER_PACK", 2)
    kept: list[Kept] = []
    packs = [_pack([7, 7, 8, 9], [(1, 2, 1), (1, 1, 1), (1, 1, 3), (1, 1, 1)], 10), _pack([8, 5], [(1, 1, 2)] * 2, 20)]
    assert list(keep_some(packs, kept)) == packs, "packs pass through unchanged"
    assert [item.row for item in kept] == [0, 2, 5]
    for item, value in zip(kept, (10, 12, 21), strict=True):
        assert item.pixels.shape == (1, item.grid[1] * PATCH, item.grid[2] * PATCH, 3)
        assert item.pixels.unique().tolist() == [value]


def _drawn_page(path: Path, captions: list[str], labels: list[str | None] | None = None, **keywords) -> Image.Image:
    kept = [_item((1, 3, 5), 1, 0), _item((2, 4, 2), 4, 1)]
    text = torch.tensor([[1.0, 4.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    found = made(torch.tensor([[1.0, 0.0]]).expand(len(captions), 2), text[: len(captions)], captions, labels)
    draw_sheet(_model(), kept, found, path, **keywords)
    with Image.open(path) as page:
        assert page.format == "PNG"
        return page.convert("RGB")


def test_a_page_names_run_data_captions_and_what_numbers_mean(tmp_path: Path, drawn: list[str]):
    page = _drawn_page(
        tmp_path / "page.png", list("abcde"), title="Run x, checkpoint step-7", data="photos (split test)"
    )
    text = " ".join(drawn)
    assert "Run x, checkpoint step-7: 2 held-out images" in drawn
    assert "From 5 images of photos (split test): 2 with different captions" in text
    assert "cosine similarity" in text
    assert "the nearest one for 1 of 2 items here" in text
    assert "3 nearest of 5 different captions" in text
    assert drawn.count("1.000") == 2, "the nearest caption of each item"
    assert [line for line in drawn if line.startswith("own")] == ["own caption: place 5 of 5, 0.243"], "of item a"
    assert len(page.getcolors(1 << 24)) > 20
    for colour in (cards.RIGHT, cards.WRONG):
        assert any(found == colour for _, found in page.getcolors(1 << 24))


def test_labels_are_shown_where_there_are_no_captions(tmp_path: Path, drawn: list[str]):
    _drawn_page(tmp_path / "page.png", ["", ""], ["cat", None])
    assert "label: cat" in drawn
    assert "no caption" in drawn
    assert "cosine" not in " ".join(drawn)


def test_the_same_examples_give_the_same_pixels(tmp_path: Path):
    pages = [_drawn_page(tmp_path / f"{number}.png", list("abcde")).tobytes() for number in range(2)]
    assert pages[0] == pages[1]
