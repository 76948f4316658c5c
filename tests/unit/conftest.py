"""Fixtures of unit tests of several packages."""

from tests.support.drawn import drawn, font_folder

__all__ = ["drawn", "font_folder"]
