"""Records what Pillow draws, and makes fonts, for tests of pages.

Libraries are imported in the functions, since the fixtures are those of all unit tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that Pillow has drawn in the test, in order."""
    from PIL import ImageDraw

    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def record(self, xy, text, *args, **kwargs):
        texts.append(text)
        return draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return texts


@pytest.fixture
def font_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder for fonts, which is the only one of the system in the test. Fonts are searched again after it."""
    from univitar_ds.viz import fonts

    folder = tmp_path / "share" / "fonts"
    folder.mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fonts.forget_fonts()
    yield folder
    monkeypatch.undo()
    fonts.forget_fonts()


def write_font(path: Path, characters: str, family: str = "Made") -> None:
    """Writes a font in which each of `characters` is a filled square, 1 em wide, and any other an empty outline."""
    from fontTools.fontBuilder import FontBuilder

    names = {ord(char): f"glyph{number}" for number, char in enumerate(characters)}
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({".notdef": _square(0, 400)} | {name: _square(0, 900) for name in names.values()})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900)
    builder.setupPost()
    builder.save(path)


def _square(low: int, high: int):
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((low, low))
    for point in ((low, high), (high, high), (high, low)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()
