"""Folders of the checkout that the tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
