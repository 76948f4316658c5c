"""Pages of items: titles and legends, marks, cards in rows, and images at a common height."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from univitar_ds.geometry import PATCH
from univitar_ds.viz import cards
from univitar_ds.viz.cards import CARD, PAPER, RIGHT, WRONG, Card, Line, draw_mark, draw_page, item_card

SHARES = [0.5, 0.25, 0.125]


def card(width: int, height: int = 100, text: str = "a caption", value: int = 7) -> Card:
    return Card([[Image.new("RGB", (width, height), (value, 0, 77))]], "2 x 3 tokens", [Line(text)])


def boxes(page: Image.Image, values) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the images of cards with these values."""
    pixels = np.asarray(page).astype(int)
    found = []
    for value in values:
        rows, columns = np.nonzero((pixels == [value, 0, 77]).all(axis=2))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return found


def test_a_page_has_its_title_its_legend_and_the_meaning_of_the_colours(drawn):
    draw_page("Run x: 3 images", [Line("three of them", right=True)], [card(90)], SHARES)
    assert "Run x: 3 images" in drawn
    assert "three of them" in drawn
    assert "principal components" in " ".join(drawn)
    for number, share in enumerate((50, 25, 12), 1):
        assert f"component {number}: {share} % of the variance" in drawn


def test_cards_keep_their_order_and_do_not_overlap_on_a_page_of_bounded_width():
    shown = [card(40 + 60 * (index % 5), value=10 + index) for index in range(14)]
    page = draw_page("title", [], shown, SHARES)
    assert page.width <= cards.WIDTH
    placed = boxes(page, range(10, 24))
    assert [(right - left, bottom - top) for left, top, right, bottom in placed] == [
        shown[index].rows[0][0].size for index in range(14)
    ]
    for (_, top, right, bottom), (next_left, next_top, *_) in pairwise(placed):
        assert (next_top == top and next_left > right) or (next_top > bottom and next_left < right)
    assert len({top for _, top, _, _ in placed}) < 7, "several cards in a row"


def test_rows_are_as_wide_as_the_page_and_about_equally_full():
    page = draw_page("title", [], [card(150, value=10 + index) for index in range(8)], SHARES)
    tops = [top for _, top, _, _ in boxes(page, range(10, 18))]
    assert [tops.count(top) for top in sorted(set(tops))] == [3, 3, 2], "of at most 4 a row"
    white = (np.asarray(page) == CARD).all(axis=2)
    for top in set(tops):
        assert np.flatnonzero(white[top]).max() == page.width - cards.GAP - 2


def test_a_single_card_in_the_last_row_is_not_stretched():
    shown = [card(width, value=10 + index) for index, width in enumerate((600, 600, 900, 100))]
    page = draw_page("title", [], shown, SHARES)
    white = (np.asarray(page) == CARD).all(axis=2)
    ends = [np.flatnonzero(white[top]).max() for _, top, _, _ in boxes(page, range(10, 14))]
    assert ends[:3] == [page.width - cards.GAP - 2] * 3
    assert ends[3] < page.width / 2


def test_a_single_card_in_another_row_is_stretched():
    page = draw_page("title", [], [card(100, value=10), card(1000, value=11), card(1000, value=12)], SHARES)
    white = (np.asarray(page) == CARD).all(axis=2)
    (_, top, _, _) = boxes(page, (10,))[0]
    assert np.flatnonzero(white[top]).max() == page.width - cards.GAP - 2


def test_lines_of_right_to_left_text_end_at_the_same_place(monkeypatch):
    ends = []
    draw = cards.draw_text

    def record(pen, at, text, size, fill, **keywords):
        if size == cards.TEXT_PX and at[1] > 0 and "\u05d0" <= text[0] <= "\u05ea":
            ends.append(round(at[0] + cards.text_width(text, size)))
        draw(pen, at, text, size, fill, **keywords)

    monkeypatch.setattr(cards, "draw_text", record)
    text = "שלום עולם עיגול אדום מעל ריבוע כחול ועוד מילים רבות"
    draw_page("title", [], [Card([[Image.new("RGB", (60, 60))]], "n", [Line("x"), Line(text, 5, wraps=True)])], SHARES)
    assert len(ends) >= 2
    assert len(set(ends)) == 1


def test_a_few_narrow_items_make_a_narrow_page():
    assert draw_page("title", [], [card(50)], SHARES).width < 700


def test_texts_stay_within_their_card():
    long = Card(
        [[Image.new("RGB", (60, 150))]], "n", [Line("x" * 500, 3), Line("word " * 99, 2, right=False, value="0.5")]
    )
    page = np.asarray(draw_page("title", [], [long] * 5, SHARES))
    gap = (page == PAPER).all(axis=2)
    assert gap[:, : cards.GAP].all()
    assert gap[:, -cards.GAP :].all()
    assert gap[-cards.GAP :].all()


def test_marks_differ_in_shape_not_only_in_colour():
    images = []
    for right, colour in ((True, RIGHT), (False, WRONG)):
        image = Image.new("RGB", (16, 16), "white")
        draw_mark(ImageDraw.Draw(image), (2, 2), right)
        images.append((np.asarray(image) == colour).all(axis=2))
    assert images[0].sum() > 15
    assert images[1].sum() > 15
    assert (images[0] != images[1]).sum() > 15
    assert images[1][2:5, 2:5].any(), "the upper left end of the cross"
    assert not images[0][2:5, 2:5].any()


def test_numbers_of_a_card_end_at_the_same_place(monkeypatch):
    ends = []
    draw = cards.draw_text

    def record(pen, at, text, size, fill, **keywords):
        if text in ("0.141", "-0.025"):
            ends.append(at[0] + cards.text_width(text, size))
        draw(pen, at, text, size, fill, **keywords)

    monkeypatch.setattr(cards, "draw_text", record)
    lines = [Line("one", right=True, value="0.141"), Line("two", right=False, value="-0.025")]
    draw_page("title", [], [Card([[Image.new("RGB", (60, 60))]], "n", lines)], SHARES)
    assert len(ends) == 2
    assert ends[0] == pytest.approx(ends[1])


def test_an_image_is_shown_beside_its_tokens_with_both_sizes():
    frames = torch.full((1, 3 * PATCH, 4 * PATCH, 3), 9, dtype=torch.uint8)
    shown = item_card(frames, torch.full((1, 3, 4, 3), 5, dtype=torch.uint8), [])
    ((image, tokens),) = shown.rows
    assert image.size == tokens.size
    assert np.asarray(image).max() == 9
    assert np.asarray(tokens).max() == 5
    assert shown.note == "42 x 56 px | 3 x 4 tokens"


def test_a_video_shows_numbered_frames_above_the_tokens_of_their_moments():
    frames = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, PATCH, PATCH, 3)
    colours = (100 + torch.arange(4, dtype=torch.uint8))[:, None, None, None].expand(4, 1, 1, 3)
    shown = item_card(frames, colours, [])
    values = [[int(np.asarray(part).max()) for part in row] for row in shown.rows]
    assert values == [[0, 4, 7], [100, 102, 103]]
    assert shown.note == "frames 1, 5, 8 of 8 | 14 x 14 px | 4 x 1 x 1 tokens"


@pytest.mark.parametrize("grid", [(1, 300, 1), (1, 1, 300), (8, 300, 1), (8, 1, 300)])
def test_items_of_any_shape_keep_their_note_beside_their_texts(grid, monkeypatch):
    notes = []
    draw = cards.draw_text

    def record(pen, at, text, size, fill, **keywords):
        if size == cards.NOTE_PX:
            notes.append(at[0] + cards.text_width(text, size))
        draw(pen, at, text, size, fill, **keywords)

    monkeypatch.setattr(cards, "draw_text", record)
    t, h, w = grid
    frames = torch.zeros(1 if t == 1 else 2 * t, h * PATCH, w * PATCH, 3, dtype=torch.uint8)
    shown = item_card(frames, torch.zeros(t, h, w, 3, dtype=torch.uint8), [Line("text")])
    draw_page("title", [], [shown], SHARES)
    assert notes
    assert max(notes) <= cards.PADDING + shown.images_size[0] + cards.PADDING


def test_a_page_reports_characters_without_a_font(drawn):
    draw_page("title", [], [card(90, text="private \U0003fffd")], SHARES)
    assert any("U+3FFFD" in text and "no font" in text for text in drawn)


def test_the_same_items_give_the_same_pixels():
    pages = [draw_page("title", [Line("text")], [card(90), card(40)], SHARES) for _ in range(2)]
    assert pages[0].tobytes() == pages[1].tobytes()
