"""The page of a pack of a training step."""

import numpy as np
import pytest
import torch

from tests.support.grey import grey_pack
from univitar_ds.viz import cards
from univitar_ds.viz.training_images import BLANK, draw_pack


def whole(pack, tokens, **keywords):
    return draw_pack(pack, len(pack), tokens, torch.arange(len(tokens)), 1, **keywords)


def place(page, value):
    """Left, top, right and bottom of the pixels of an item."""
    rows, columns = np.nonzero((page == value).all(2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_places_of_dropped_tokens_stay_blank(drawn):
    pack = grey_pack((1, 2, 4), (1, 1, 2))
    tokens = torch.eye(5, 6) + torch.arange(5)[:, None]
    page = np.asarray(draw_pack(pack, 1, tokens, torch.tensor([0, 1, 2, 3, 5]), 1))
    _, top, right, bottom = place(page, 50)
    side = (bottom - top) // 2
    left = right + cards.BETWEEN
    lower = page[top + side + 1 : bottom - 1, left : left + 4 * side]
    blank = (lower == BLANK).all((0, 2))
    assert blank[1 : side - 1].all(), "the first place of the second row"
    assert not blank[side + 1 : 2 * side - 1].any(), "the second place of the second row"
    assert blank[2 * side + 2 :].all(), "the rest of it"
    assert any("patch dropout removed (3 of 8)" in text for text in drawn)


def test_without_dropped_tokens_the_legend_does_not_mention_them(drawn):
    pack = grey_pack((1, 2, 4))
    whole(pack, torch.randn(8, 6))
    assert "dropout" not in " ".join(drawn)


def test_an_image_stands_beside_its_colours_at_a_common_height():
    pack = grey_pack((1, 3, 3), (1, 4, 2))
    page = np.asarray(whole(pack, torch.randn(17, 8)))
    for value, width in ((50, 150), (100, 75)):
        left, top, right, bottom = place(page, value)
        assert (right - left, bottom - top) == (width, 150)
        tokens = page[top:bottom, right + cards.BETWEEN : right + cards.BETWEEN + width]
        assert not (tokens == cards.CARD).all(2).all((0, 1)), "tokens beside it"
        assert (page[top:bottom, right : right + cards.BETWEEN] == cards.CARD).all()


def test_a_video_shows_frames_above_the_colours_of_their_moments():
    pack = grey_pack((2, 3, 3), frames=4, modality="video")
    moments = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).repeat_interleave(9, 0)
    page = np.asarray(whole(pack, moments))
    left, top, right, bottom = place(page, 50)
    side = bottom - top
    assert right - left == 3 * side + 2 * cards.BETWEEN
    lefts = [left + part * (side + cards.BETWEEN) for part in range(3)]
    colours = [page[bottom + cards.BETWEEN : bottom + cards.BETWEEN + side, x : x + side] for x in lefts]
    assert all((colour == colour[0, 0]).all() for colour in colours)
    assert (colours[0][0, 0] != colours[1][0, 0]).any(), "frame 0 is of the first moment, frame 2 of the second"
    assert (colours[1] == colours[2]).all()


def test_the_page_names_step_pack_captions_and_keys(drawn):
    pack = grey_pack((1, 4, 4), (1, 4, 4), (1, 4, 4))
    draw_pack(pack, 2, torch.randn(32, 4), torch.arange(32), 1, title="Run demo, step 7")
    assert "Run demo, step 7: 2 of 3 images of a pack" in drawn
    assert "Pack 0 of lane 0" in " ".join(drawn)
    assert [text for text in drawn if text.startswith(("grey ", "s/"))] == ["grey 50", "s/0", "grey 100", "s/1"]


@pytest.mark.parametrize(("label", "text"), [("cat", "label: cat"), (None, "no caption")])
def test_an_item_without_a_caption_shows_its_label(drawn, label, text):
    pack = grey_pack((1, 4, 4))
    pack.captions[0], pack.labels[0] = "", label
    whole(pack, torch.randn(16, 4))
    assert text in drawn


def test_many_items_flow_into_rows():
    few, many = grey_pack(*[(1, 4, 4)] * 2), grey_pack(*[(1, 4, 4)] * 8)
    pages = [whole(pack, torch.randn(pack.tokens, 4)) for pack in (few, many)]
    assert pages[0].height + 250 < pages[1].height < pages[0].height + 600
    assert max(page.width for page in pages) <= cards.WIDTH
