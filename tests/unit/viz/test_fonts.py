"""Texts on pages: every script that a font of the machine has, lines that fit, and hostile captions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.support.drawn import write_font
from univitar_ds.viz import fonts
from univitar_ds.viz.fonts import clean, draw_text, fallbacks, missing, text_width, wrap

INK, PAPER = (0, 0, 0), (255, 255, 255)


def ink_of(text: str, size: int = 20, *, bold: bool = False) -> np.ndarray:
    """Which pixels of a line are darker than half."""
    image = Image.new("RGB", (400, 40), PAPER)
    draw_text(ImageDraw.Draw(image), (5, 5), text, size, INK, bold=bold)
    return np.asarray(image.convert("L")) < 128


@pytest.fixture
def own_font(font_folder, monkeypatch):
    """A machine without matplotlib and without fonts."""
    monkeypatch.setattr(fonts, "find_spec", lambda name: None)
    fonts.forget_fonts()


@pytest.mark.parametrize("text", ["Grüße", "Ελληνικά", "Кириллица", "שלום", "مرحبا", "✓ ✗ ½"])
def test_scripts_of_the_first_font_need_no_other_font(font_folder, text):
    assert missing([text]) == []
    assert fallbacks([text]) == []


def test_a_character_without_a_font_is_reported_and_drawn_as_a_box(font_folder, drawn):
    assert missing(["a 日", "本 b 日"]) == ["日", "本"]
    ink_of("a日")
    assert drawn == ["a□"]


def test_a_font_of_the_system_draws_what_the_first_font_lacks(font_folder, drawn):
    write_font(font_folder / "Made-Regular.ttf", "日本")
    assert missing(["日本語"]) == ["語"]
    assert fallbacks(["a 日"]) == [font_folder / "Made-Regular.ttf"]
    ink = ink_of("日")
    assert drawn == ["日"]
    assert ink.sum() == pytest.approx((0.9 * 20) ** 2, abs=40), "the square of the made font"


def test_a_character_that_the_bold_font_lacks_is_drawn_by_the_regular_one(font_folder):
    assert (ink_of("\U0001d5a0", bold=True) == ink_of("\U0001d5a0")).all()
    assert (ink_of("A", bold=True) != ink_of("A")).any()


def test_a_damaged_font_is_skipped(font_folder):
    (font_folder / "NotoSansCJK-Regular.ttc").write_bytes(b"\0\1\0\0 no font")
    write_font(font_folder / "Made-Regular.ttf", "日")
    assert fallbacks(["日"]) == [font_folder / "Made-Regular.ttf"]


def test_fonts_with_many_glyphs_and_upright_ones_come_first(font_folder):
    for name in ("Aaa-Bold.ttf", "Aaa-Regular.ttf", "NotoSansCJK-Regular.ttf", "LastResort.ttf", "AaaEmoji.ttf"):
        write_font(font_folder / name, "日")
    assert fallbacks(["日"]) == [font_folder / "NotoSansCJK-Regular.ttf"]
    (font_folder / "NotoSansCJK-Regular.ttf").unlink()
    fonts.forget_fonts()
    assert fallbacks(["日"]) == [font_folder / "Aaa-Regular.ttf"]


def test_parts_of_a_line_do_not_overlap_and_its_width_is_their_sum(font_folder):
    write_font(font_folder / "Made-Regular.ttf", "日")
    assert text_width("日", 20) == 20
    assert text_width("ab日c", 20) == text_width("ab", 20) + 20 + text_width("c", 20)
    columns = np.flatnonzero(ink_of("日aaa日").any(axis=0))
    assert columns.max() - columns.min() == pytest.approx(20 + text_width("aaa", 20) + 18, abs=2)


def test_right_to_left_text_is_drawn_whole_by_one_font(font_folder, drawn):
    ink_of("שלום עולם")
    assert drawn == ["שלום עולם"], "parts would be drawn in the wrong order"


def test_the_first_letter_decides_the_direction():
    assert fonts.right_to_left("1. שלום world")
    assert fonts.right_to_left("مرحبا")
    assert not fonts.right_to_left("world שלום")
    assert not fonts.right_to_left("123")


def test_without_dejavu_words_have_spaces_and_other_letters_are_reported(own_font):
    assert missing(["grün"]) == ["ü"]
    assert text_width("to the", 14) - text_width("to", 14) - text_width("the", 14) > 0.3 * 14
    assert ink_of("ab", bold=True).sum() > ink_of("ab").sum()


def test_text_is_drawn_without_matplotlib():
    code = (
        "import sys; from univitar_ds.viz.fonts import text_width; assert text_width('grün', 13) > 20;"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("two\n lines\t", "two lines"),
        ("u\u0308ber", "über"),
        ("evil \u202egnp.exe\u202c", "evil gnp.exe"),
        ("a\x00\x1b[31mb", "a[31mb"),
        ("z" + "\u0335" * 50, "z" + "\u0335" * 3),
        ("x" * 10**6, "x" * fonts.MOST_CHARACTERS + "..."),
    ],
)
def test_hostile_captions_are_cleaned(text, cleaned):
    assert clean(text) == cleaned


def test_a_caption_keeps_its_words_in_order_on_lines_that_fit():
    caption = "a person doing the cable chest press exercise with cable,\ntraining the chest"
    lines = wrap(caption, 150, 9, 14)
    assert " ".join(lines) == " ".join(caption.split())
    assert 3 <= len(lines) < 9
    assert all(text_width(line, 14) <= 150 for line in lines)


@pytest.mark.parametrize("caption", ["one word after another " * 20, "x" * 400, "short " + "y" * 400, "日本語" * 90])
@pytest.mark.parametrize("bold", [False, True])
def test_a_caption_that_is_too_long_ends_in_dots_and_still_fits(caption, bold):
    lines = wrap(caption, 150, 3, 14, bold=bold)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(text_width(line, 14, bold=bold) <= 150 for line in lines)


def test_no_caption_takes_no_line():
    assert wrap("  ", 150, 3, 14) == []


def test_lines_break_between_cjk_characters_and_not_before_their_punctuation():
    lines = wrap("a 红色的方块在蓝色圆圈的左边,好", 100, 9, 14)
    assert lines[0].startswith("a 红"), "not after the first space"
    assert "".join(lines) == "a 红色的方块在蓝色圆圈的左边,好"
    assert not any(line.startswith(",") for line in lines)


def test_keys_break_at_their_separators():
    assert wrap("shard-000123/sample-000456", 100, 9, 14) == ["shard-", "000123/", "sample-", "000456"]


def test_a_letter_keeps_its_marks():
    lines = wrap("क्षि" * 30, 60, 30, 14)
    assert len(lines) > 3
    assert not any(fonts._follows(line[0]) for line in lines)
