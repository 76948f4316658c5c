"""Fixtures that the unit tests of several packages use."""

from tests.support.drawn import drawn, font_folder

__all__ = ["drawn", "font_folder"]
