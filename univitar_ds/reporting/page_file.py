"""Recognises the pages that this program wrote. Needs no installed packages, as `make clean` does."""

from __future__ import annotations

from pathlib import Path

GENERATOR = '<meta name="generator" content="univitar-ds report">'
"""The line of a page by which `is_page` recognises it."""


def is_page(path: Path) -> bool:
    """Whether `report` or the demo wrote this file. Raises: OSError if it cannot be read."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(2048)
