"""What a format of sources is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from univitar_ds.data.importing.rows import Listing, ReadOptions


class Format(NamedTuple):
    """A form of data sets: what it is called in messages, whether a source has it, its rows, and the options
    (`ReadOptions`) that it uses. Those of plugins come first when a source is recognised."""

    title: str
    recognises: Callable[[str], bool]
    rows: Callable[[str, ReadOptions], Listing]
    uses: frozenset[str] = frozenset()
