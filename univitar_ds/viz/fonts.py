"""Measures, wraps and draws text of any script with Pillow, in DejaVu Sans or else in fonts of the system.

Captions are untrusted: control characters and text directions are removed, and long texts are cut before they are
measured. A character that no font has is drawn as a box, and `missing` lists it.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from PIL import ImageDraw, ImageFont

MOST_CHARACTERS = 240
"""Maximum number of characters of a text that are drawn. No text on a page has space for more."""
MOST_MARKS = 3
"""Maximum number of combining marks on one letter. More would be drawn over other lines."""
MOST_FONTS, MOST_FILES = 60, 20_000
"""Maximum numbers of system fonts that are searched for a glyph, and of files that are listed to find fonts."""
ELLIPSIS = "..."
PREFERRED = ("notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "ipag", "notosans", "freesans", "unifont")
"""Beginnings of names of fonts that have many glyphs. They are searched first."""
UNWANTED = ("lastresort", "emoji")
"""Fonts whose glyphs are boxes, or images in one size."""
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F}
ABSENT = "\U0010ffff"
"""A character that no font has. Fonts draw their box for it."""

Rgb = tuple[int, int, int]


def clean(text: str) -> str:
    """Returns `text` in one line, composed, without control characters, and cut to `MOST_CHARACTERS`."""
    kept, marks = [], 0
    for char in unicodedata.normalize("NFC", " ".join(text[: 4 * MOST_CHARACTERS].split())):
        marks = marks + 1 if unicodedata.category(char)[0] == "M" else 0
        if marks <= MOST_MARKS and ord(char) not in DIRECTIONS and unicodedata.category(char) not in ("Cc", "Cs", "Co"):
            kept.append(char)
    return "".join(kept[:MOST_CHARACTERS]) + (ELLIPSIS if len(kept) > MOST_CHARACTERS else "")


def missing(texts: Iterable[str]) -> list[str]:
    """Returns the characters of `texts` that no font of this machine has, sorted."""
    return sorted({char for text in texts for char in clean(text) if _font_of(char) is None})


def fallbacks(texts: Iterable[str]) -> list[Path]:
    """Returns the files of the system's fonts that `texts` need in addition to the first font, sorted."""
    found = {_font_of(char) for text in texts for char in clean(text)} - {None, 0}
    return sorted(_system_fonts()[number - 1] for number in found)


@lru_cache(maxsize=4096)
def text_width(text: str, size: int, *, bold: bool = False) -> float:
    """Returns the width in pixels of a line at a font size of `size` pixels."""
    return sum(font.getlength(run) for font, run in _runs(text, size, bold))


def draw_text(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, fill: Rgb, *, bold: bool = False
) -> None:
    """Draws a line; `at` is its upper left corner in pixels. Use texts that `wrap` or `clean` returned."""
    left, baseline = at[0], at[1] + _font(0, size, bold).getmetrics()[0]
    for font, run in _runs(text, size, bold):
        pen.text((left, baseline), run, fill=fill, font=font, anchor="ls")
        if bold and _first_font(bold) is None:
            pen.text((left + 0.6, baseline), run, fill=fill, font=font, anchor="ls")
        left += font.getlength(run)


def line_height(size: int) -> int:
    """Returns the distance of two lines in pixels at a font size of `size` pixels."""
    return round(1.35 * size)


def right_to_left(text: str) -> bool:
    """Whether the first letter of `text` is of a script that is read from right to left."""
    directions = (unicodedata.bidirectional(char) for char in clean(text))
    return next((direction for direction in directions if direction in ("L", "R", "AL")), "L") != "L"


def wrap(text: str, width: int, lines: int, size: int, *, bold: bool = False) -> list[str]:
    """Wraps `text`, cleaned, to at most `lines` lines of `width` pixels. Text that does not fit ends with three dots.

    Lines break at spaces, after slashes, hyphens and underscores, between Chinese, Japanese or Korean characters, and
    within words that are wider than a line.
    """
    words, wrapped = clean(text), []
    while words and len(wrapped) < lines:
        fits = _fitting(words, width, size, bold)
        if fits < len(words) and len(wrapped) == lines - 1:
            short = _fitting(words, width - text_width(ELLIPSIS, size, bold=bold), size, bold)
            wrapped.append(words[:short].rstrip() + ELLIPSIS)
            break
        if fits < len(words):
            fits = next((place for place in range(fits, 0, -1) if _breaks(words, place)), fits)
        wrapped.append(words[:fits].rstrip())
        words = words[fits:].lstrip()
    return wrapped


def _breaks(text: str, place: int) -> bool:
    """Whether a line may end before the character at `place`."""
    if text[place] == " " or (text[place - 1] in "/-_" and text[place].isalnum()):
        return True
    wide = any(unicodedata.east_asian_width(char) in "WF" for char in text[place - 1 : place + 1])
    return wide and not _joined(text, place) and unicodedata.category(text[place])[0] != "P"


def _joined(text: str, place: int) -> bool:
    """Whether the character at `place` is drawn together with the one before it."""
    return _follows(text[place]) or text[place - 1] == "\u200d"


def _follows(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf")


def _fitting(text: str, width: float, size: int, bold: bool) -> int:
    """Returns the length of the longest prefix that fits into `width` pixels; at least 1. Letters keep their marks."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_width(text[:middle], size, bold=bold) <= width else (low, middle - 1)
    place = low
    while 0 < place < len(text) and _joined(text, place):
        place -= 1
    return place or low


def _runs(text: str, size: int, bold: bool) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Yields the parts of a line that one font draws, in order. Spaces and marks keep the font of what they follow."""
    run, current = "", (0, bold)
    if _first_font() is None:
        text = text.replace(" ", "  ")  # the space of Pillow's own font is 0.2 em wide, so that words run together
    for char in text:
        number = _font_of(char)
        if number is None:
            char, number = box(), 0
        font = (number, bold and number == 0 and (_first_font(True) is None or _has(0, char, True)))
        if run and (char == " " or _follows(char)):
            font = current
        if run and font != current:
            yield _font(current[0], size, current[1]), run
            run = ""
        current = font
        run += char
    if run:
        yield _font(current[0], size, current[1]), run


def box() -> str:
    """Returns the character that is drawn in place of one that no font has."""
    return "\u25a1" if _has(0, "\u25a1") else "?"


@cache
def _first_font(bold: bool = False) -> Path | None:
    """Returns the file of DejaVu Sans: that of matplotlib, which need not be imported, else the system's, else None."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    spec = find_spec("matplotlib")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / name
        if path.is_file():
            return path
    return next((path for path in _font_files() if path.name == name), None)


@cache
def _font(number: int, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns font `number` in a size in pixels: 0 is the first font, or Pillow's own if there is none."""
    path = (_first_font(bold) or _first_font()) if number == 0 else _system_fonts()[number - 1]
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@lru_cache(maxsize=65536)
def _font_of(char: str) -> int | None:
    """Returns the number of the first font that has `char`; None if there is none."""
    if char == " " or _follows(char) or _has(0, char):
        return 0
    return next((number for number in range(1, len(_system_fonts()) + 1) if _has(number, char)), None)


def _has(number: int, char: str, bold: bool = False) -> bool:
    """Whether a font has a glyph for `char`, which is not the box that it draws for characters that it lacks."""
    font, absent = _probed(number, bold)
    if font is None:
        return False
    mask = font.getmask(char)
    return mask.size[0] > 0 and (mask.size, bytes(mask)) != absent


@cache
def _probed(number: int, bold: bool) -> tuple[ImageFont.FreeTypeFont | None, tuple[tuple[int, int], bytes] | None]:
    """Returns a font and its box for characters that it lacks; None for a damaged font, or one that has no such size.

    The basic layout is enough for single characters and faster.
    """
    try:
        path = _first_font(bold) if number == 0 else _system_fonts()[number - 1]
        font = (
            ImageFont.truetype(path, 16, layout_engine=ImageFont.Layout.BASIC) if path else ImageFont.load_default(16)
        )
        mask = font.getmask(ABSENT)
    except (OSError, ValueError):
        return None, None
    return font, (mask.size, bytes(mask))


@cache
def _font_files() -> list[Path]:
    """Returns the font files in the folders of the system, of the user and of a conda environment, sorted."""
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    data = [home, *(os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")]
    folders = [*(os.path.join(folder, "fonts") for folder in data if folder), os.path.expanduser("~/.fonts")]
    folders += [os.path.join(sys.prefix, "fonts"), "/Library/Fonts", "/System/Library/Fonts"]
    found, seen = [], 0
    for folder in dict.fromkeys(folders):
        for parent, inner, names in os.walk(folder):
            inner.sort()
            seen += len(names)
            found += [Path(parent, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]
            if seen > MOST_FILES:
                break
    return sorted(found, key=str)


@cache
def _system_fonts() -> list[Path]:
    """Returns at most `MOST_FONTS` of the font files, those with many glyphs first. Bold and slanted ones come last."""

    def rank(path: Path) -> tuple[int, bool, str]:
        name = path.name.lower().replace("-", "").replace("_", "")
        first = next((index for index, begin in enumerate(PREFERRED) if name.startswith(begin)), len(PREFERRED))
        styled = any(style in name for style in ("bold", "italic", "oblique", "black", "light", "thin", "mono"))
        return first, styled, str(path)

    wanted = [path for path in _font_files() if not any(word in path.name.lower() for word in UNWANTED)]
    return sorted(wanted, key=rank)[:MOST_FONTS]


def forget_fonts() -> None:
    """Clears all caches of fonts, for a process in which fonts are installed and for tests."""
    for cached in (text_width, _first_font, _font, _font_of, _probed, _font_files, _system_fonts):
        cached.cache_clear()
