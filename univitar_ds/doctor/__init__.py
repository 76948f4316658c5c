"""Checks of the machines before a run: `univitar-ds doctor`. One file for each kind of check."""

__all__ = ["run"]
