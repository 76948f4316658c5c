"""The sheet of a pack of a training step."""

import numpy as np
import torch

from tests.support.grey import grey_pack
from univitar_ds.viz import training_images
from univitar_ds.viz.training_images import BLANK, draw_pack


def whole(pack, tokens):
    return draw_pack(pack, len(pack), tokens, torch.arange(len(tokens)), 1)


def test_places_of_dropped_tokens_stay_blank():
    pack = grey_pack((1, 2, 4), (1, 1, 2))
    tokens = torch.eye(5, 6) + torch.arange(5)[:, None]
    sheet = np.asarray(draw_pack(pack, 1, tokens, torch.tensor([0, 1, 2, 3, 5]), 1))
    left = training_images.GAP + 260 + 2  # beside an image of 2 x 4 patches, 130 pixels high
    lower = sheet[training_images.GAP + 66 : training_images.GAP + 129, left : left + 259]
    blank = (lower == BLANK).all((0, 2))
    assert blank[1:64].all(), "the first place of the second row"
    assert not blank[66:129].any(), "the second place of the second row"
    assert blank[131:].all(), "the rest of it"


def test_an_image_stands_beside_its_colours_and_both_keep_their_proportions():
    pack = grey_pack((1, 3, 5), (1, 4, 2))
    sheet = np.asarray(whole(pack, torch.randn(23, 8)))
    gap = training_images.GAP
    for value, left, width in ((50, gap, 250), (100, gap + 502 + 2 * gap, 75)):
        there = (sheet == value).all(2)
        assert there[gap : gap + 150, left : left + width].all()
        assert not there[gap : gap + 150, left + width + 2 : left + 2 * width + 2].all()
        assert not there[gap : gap + 150, left + width : left + width + 2].any()
    ink = (sheet == training_images.INK).all(2)
    assert ink[gap + 152 :].any(), "no caption"


def test_a_video_shows_frames_above_the_colours_of_their_moments():
    pack = grey_pack((2, 3, 4), frames=4, modality="video")
    moments = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).repeat_interleave(12, 0)
    sheet = np.asarray(whole(pack, moments))
    gap, width, height = training_images.GAP, 139, 104
    lefts = [gap + part * (width + 2) for part in range(3)]
    frames = [sheet[gap : gap + height, left : left + width] for left in lefts]
    assert all((frame == 50).all() for frame in frames)
    colours = [sheet[gap + height + 2 : gap + 2 * height + 2, left : left + width] for left in lefts]
    assert all((colour == colour[0, 0]).all() for colour in colours)
    assert (colours[0][0, 0] != colours[1][0, 0]).any(), "frame 0 is of the first moment, frame 2 of the second"
    assert (colours[1] == colours[2]).all()


def test_cards_that_do_not_fit_beside_each_other_go_below():
    few, many = grey_pack(*[(1, 4, 4)] * 2), grey_pack(*[(1, 4, 4)] * 8)
    sheets = [whole(pack, torch.randn(pack.tokens, 4)) for pack in (few, many)]
    assert sheets[1].height == 3 * sheets[0].height
    assert max(sheet.width for sheet in sheets) <= training_images.WIDTH
