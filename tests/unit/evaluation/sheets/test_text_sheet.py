"""The sheet of captions and the items that are found for them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.unit.evaluation.made import made
from univitar_ds.evaluation.sheets import text_sheet
from univitar_ds.evaluation.sheets.text_sheet import draw_text_sheet, keep_thumbnails
from univitar_ds.viz import cards

GREY_LEVELS = 8
"""JPEG of quality 90 changes a plain colour by less."""


def _pack(values: list[int], captions: list[str], frames: int = 1) -> SimpleNamespace:
    pixels = [torch.full((frames, 28, 42, 3), value, dtype=torch.uint8) for value in values]
    return SimpleNamespace(images=lambda: pixels, captions=captions)


def test_the_first_items_with_a_caption_have_thumbnails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_sheet, "MOST_ITEMS", 4)
    packs, kept = [_pack([10, 60, 110], ["a", "", "c"]), _pack([160, 210], ["d", "e"])], []
    assert list(keep_thumbnails(packs, kept)) == packs
    assert [bool(jpeg) for jpeg in kept] == [True, False, True, True]
    for jpeg, value in zip(kept, (10, None, 110, 160), strict=True):
        if jpeg:
            image = Image.open(io.BytesIO(jpeg))
            assert image.size == (90, 60)
            assert all(abs(low - value) + abs(high - value) < GREY_LEVELS for low, high in image.getextrema())


def test_frames_of_a_video_are_below_each_other():
    frames = torch.arange(5, dtype=torch.uint8).mul(50).view(5, 1, 1, 1).expand(5, 28, 42, 3)
    image = cards.thumbnail(frames)
    assert image.size == (90, 3 * 60 + 2 * cards.BETWEEN)
    assert [image.getpixel((45, y))[0] for y in (30, 92, 154)] == [0, 100, 200]


def test_items_that_are_found_are_in_order_each_above_its_mark():
    sizes, values = ((90, 20), (10, 60), (40, 40)), (50, 100, 150)
    hits = [
        cards.Hit(Image.new("RGB", size, (value,) * 3), value == 100, "0.5")
        for size, value in zip(sizes, values, strict=True)
    ]
    (row,) = cards.hits_card(hits, []).rows
    assert len({image.height for image in row}) == 1
    for image, (width, height), value in zip(row, sizes, values, strict=True):
        top = 60 - height
        assert [image.getpixel((0, y))[0] for y in (top, 59)] == [value, value]
        assert image.getpixel((width, top)) == cards.CARD
        below = {colour for _, colour in image.crop((0, 60, image.width, image.height)).getcolors(1 << 16)}
        assert (cards.RIGHT in below, cards.WRONG in below) == (value == 100, value != 100)


def _drawn(
    path: Path, captions: list[str], queries: list[int], data: str = "photos (split test)", **changed
) -> Image.Image | None:
    vision = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 3.0], [1.0, 4.0], [0.0, 1.0]])[: len(captions)]
    text = torch.tensor([[1.0, 0.0]]).expand(len(captions), 2)
    thumbnails: list[bytes] = []
    list(keep_thumbnails([_pack([40 * row for row in range(len(captions))], captions)], thumbnails))
    found = replace(made(vision, text, captions), **changed)
    draw_text_sheet(found, queries, thumbnails, path, title="Run x", data=data)
    return Image.open(path).convert("RGB") if path.exists() else None


def test_a_page_marks_the_items_that_have_the_caption(tmp_path: Path, drawn: list[str]):
    page = _drawn(tmp_path / "page.png", [*"abcde", ""], [0, 4])
    words = " ".join(drawn)
    assert "Run x: images found for 2 held-out captions" in drawn
    assert "the 4 nearest of 5 captioned images of photos (split test)" in words
    assert "the nearest one does for 1 of 2 captions" in words
    assert drawn.count("1.000") == 2, "the nearest item of each caption"
    assert [line for line in drawn if line.startswith("own")] == ["own image: place 5 of 5, 0.243"], "of caption e"
    assert "Colours" not in words, "the page has no colours of tokens"
    colours = {colour for _, colour in page.getcolors(1 << 24)}
    assert {cards.RIGHT, cards.WRONG} <= colours
    assert {0, 40, 80, 120} <= {red for red, green, blue in colours if red == green == blue}, "the nearest images"


def test_the_legend_of_videos_is_whole_for_long_names_of_sources(tmp_path: Path, drawn: list[str]):
    data = ", ".join(f"videos-{number} (split validation)" for number in range(3))
    _drawn(tmp_path / "page.png", list("abcde"), [0], data, modality="video")
    words = " ".join(drawn)
    assert f"{data}." in words
    assert "The frames of a video are below each other." in words


def test_items_with_equal_keys_keep_their_own_captions(tmp_path: Path, drawn: list[str]):
    _drawn(tmp_path / "page.png", list("abcde"), [0, 4], keys=["shard/0"] * 5)
    assert {"a", "e"} <= set(drawn)


def test_without_captions_there_is_no_page(tmp_path: Path):
    assert _drawn(tmp_path / "page.png", ["", ""], [0]) is None


def test_a_page_says_that_only_the_first_items_can_be_found(tmp_path: Path, drawn: list[str], monkeypatch):
    monkeypatch.setattr(text_sheet, "MOST_ITEMS", 3)
    _drawn(tmp_path / "page.png", list("abcde"), [0, 4])
    assert "the 3 nearest of the first 3 captioned images" in " ".join(drawn)
    assert "Run x: images found for 1 held-out caption" in drawn, "the item of caption e is none of them"
