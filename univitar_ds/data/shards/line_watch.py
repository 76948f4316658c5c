"""Warns of sources whose .txt members seem to have one caption per line although `captions: lines` is not set."""

from __future__ import annotations

from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.listing import warn_once

SEVERAL_IN_A_ROW = 4
"""Consecutive samples with several lines in their .txt after which the warning is logged."""


class LineWatch:
    """Counter that warns once per source if .txt members seem to have one caption per line."""

    def __init__(self, source: SourceConfig) -> None:
        self._source = source
        self._in_a_row = 0

    def see(self, several_lines: bool) -> None:
        """Counts the next sample. `several_lines`: whether its caption is a .txt with several lines."""
        self._in_a_row = self._in_a_row + 1 if several_lines else 0
        if self._in_a_row == SEVERAL_IN_A_ROW:
            warn_once(several_lines_warning(self._source))


def several_lines_warning(source: SourceConfig) -> str:
    return (
        f"source {source.path}: its .txt members have several lines, and each is read as one caption; if every line is "
        "a caption, set captions: lines in the source"
    )
