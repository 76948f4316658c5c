"""What is seen of a pack while it trains: when, of which items, and as which picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from univitar_ds.data.batch import PackedBatch, rows
from univitar_ds.geometry import PATCH
from univitar_ds.training import pictures
from univitar_ds.training.pictures import BLANK, PictureSchedule, draw_pack, watching


class Encoder(nn.Module):
    """Its tokens are their own numbers, from `first` on; those that `drops` leaves out are missing."""

    def forward(self, count, first=0, *, drops=None):
        numbers = torch.arange(first, first + count)
        return (numbers if drops is None else numbers[drops.kept])[:, None].float().requires_grad_()


def batch(*grids, frames=1, modality="image") -> PackedBatch:
    """The pixels of item i are all 50 * (i + 1), its caption says so."""
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


def glimpse_of(pack, tokens, kept=None):
    kept = torch.arange(len(tokens)) if kept is None else kept
    return pictures.Glimpse(len(pack), tokens, kept)


def drawn_at(schedule, modalities):
    steps = []
    for step, modality in enumerate(modalities, start=schedule.start + 1):
        if schedule.due(step, modality):
            steps.append(step)
            schedule.drawn[modality] = step
    return steps


def test_each_modality_is_drawn_once_in_every_so_many_steps():
    assert drawn_at(PictureSchedule(4, 0), ["image", "video"] * 6) == [4, 5, 8, 9, 12]
    assert drawn_at(PictureSchedule(4, 6), ["image"] * 4) == [8]
    assert drawn_at(PictureSchedule(4, 0), ["image"] * 9 + ["video"]) == [4, 8, 10]
    assert drawn_at(PictureSchedule(0, 0), ["image"] * 9) == []


def test_the_first_pack_is_seen_as_it_left_the_encoder_and_nobody_looks_afterwards():
    encoder = Encoder()
    with watching(encoder, batch((1, 2, 3), (1, 1, 2))) as glimpses:
        tokens = encoder(8)
        encoder(8, 100)
        tokens.data.zero_()
    encoder(8, 200)
    (glimpse,) = glimpses
    assert glimpse.items == 2
    assert glimpse.tokens.flatten().tolist() == list(range(8))
    assert not glimpse.tokens.requires_grad


def test_nobody_looks_after_a_step_that_failed():
    encoder = Encoder()
    with pytest.raises(ValueError, match="the step"), watching(encoder, batch((1, 1, 2))) as glimpses:
        raise ValueError("the step")
    encoder(2)
    assert glimpses == []


@pytest.mark.parametrize("nothing", [None, batch()])
def test_without_a_pack_or_items_there_is_nothing_to_see(nothing):
    encoder = Encoder()
    with watching(encoder, nothing) as glimpses:
        encoder(0)
    assert glimpses == []


def test_only_so_many_items_are_kept_as_cost_little(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_ITEMS", 3)
    monkeypatch.setattr(pictures, "MOST_TOKENS", 10)
    for grids, items in (([(1, 1, 2)] * 5, 3), ([(1, 2, 3), (1, 2, 2), (1, 1, 1)], 2), ([(1, 3, 4), (1, 1, 1)], 1)):
        pack = batch(*grids)
        with watching(encoder := Encoder(), pack) as glimpses:
            encoder(pack.tokens)
        assert glimpses[0].items == items
        assert len(glimpses[0].tokens) == pack.grid_thw[:items].prod(1).sum()


def test_places_of_dropped_tokens_stay_blank(monkeypatch):
    monkeypatch.setattr(pictures, "MOST_ITEMS", 1)
    pack = batch((1, 2, 4), (1, 1, 2))
    with watching(encoder := Encoder(), pack) as glimpses:
        encoder(10, drops=SimpleNamespace(kept=torch.tensor([0, 1, 2, 3, 5, 8])))
    assert glimpses[0].kept.tolist() == [0, 1, 2, 3, 5]
    tokens = torch.eye(5, 6) + torch.arange(5)[:, None]
    sheet = np.asarray(draw_pack(pack, pictures.Glimpse(1, tokens, glimpses[0].kept), 1))
    left = pictures.GAP + 260 + 2  # beside a picture of 2 x 4 patches, 130 pixels high
    lower = sheet[pictures.GAP + 66 : pictures.GAP + 129, left : left + 259]
    blank = (lower == BLANK).all((0, 2))
    assert blank[1:64].all(), "the first place of the second row"
    assert not blank[66:129].any(), "the second place of the second row"
    assert blank[131:].all(), "the rest of it"


def test_a_picture_stands_beside_its_colours_and_both_keep_their_proportions():
    pack = batch((1, 3, 5), (1, 4, 2))
    sheet = np.asarray(draw_pack(pack, glimpse_of(pack, torch.randn(23, 8)), 1))
    gap = pictures.GAP
    for value, left, width in ((50, gap, 250), (100, gap + 502 + 2 * gap, 75)):
        there = (sheet == value).all(2)
        assert there[gap : gap + 150, left : left + width].all()
        assert not there[gap : gap + 150, left + width + 2 : left + 2 * width + 2].all()
        assert not there[gap : gap + 150, left + width : left + width + 2].any()
    ink = (sheet == pictures.INK).all(2)
    assert ink[gap + 152 :].any(), "no caption"


def test_a_clip_shows_frames_above_the_colours_of_their_moments():
    pack = batch((2, 3, 4), frames=4, modality="video")
    moments = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).repeat_interleave(12, 0)
    sheet = np.asarray(draw_pack(pack, glimpse_of(pack, moments), 1))
    gap, width, height = pictures.GAP, 139, 104
    lefts = [gap + part * (width + 2) for part in range(3)]
    frames = [sheet[gap : gap + height, left : left + width] for left in lefts]
    assert all((frame == 50).all() for frame in frames)
    colours = [sheet[gap + height + 2 : gap + 2 * height + 2, left : left + width] for left in lefts]
    assert all((colour == colour[0, 0]).all() for colour in colours)
    assert (colours[0][0, 0] != colours[1][0, 0]).any(), "frame 0 is of the first moment, frame 2 of the second"
    assert (colours[1] == colours[2]).all()


def test_cards_that_do_not_fit_beside_each_other_go_below():
    few, many = batch(*[(1, 4, 4)] * 2), batch(*[(1, 4, 4)] * 8)
    sheets = [draw_pack(pack, glimpse_of(pack, torch.randn(pack.tokens, 4)), 2) for pack in (few, many)]
    assert sheets[1].height == 3 * sheets[0].height
    assert max(sheet.width for sheet in sheets) <= pictures.WIDTH
