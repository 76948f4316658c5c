"""Sources whose .txt members seem to hold a caption a line, and which do not say so."""

from __future__ import annotations

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.listing import warn_once

SEVERAL_IN_A_ROW = 4
"""Samples one after another with several lines in their .txt that make a source look like one of a caption a line."""


class LineWatch:
    """Warns once of a source whose .txt members seem to hold a caption a line, and which says nothing of that."""

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._in_a_row = 0

    def see(self, several_lines: bool) -> None:
        """Whether the caption of the next sample is a .txt of several lines."""
        self._in_a_row = self._in_a_row + 1 if several_lines else 0
        if self._in_a_row == SEVERAL_IN_A_ROW:
            warn_once(several_lines_warning(self._source))


def several_lines_warning(source: SourceConfig) -> str:
    return (
        f"source {source.path}: its .txt members have several lines, and each is read as one caption; if every line is "
        "a caption, set captions: lines in the source"
    )
