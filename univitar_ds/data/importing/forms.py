"""The description of a format of sources."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from univitar_ds.data.importing.rows import Listing, ReadOptions


class Format(NamedTuple):
    """A format of data sets.

    `title`: its name in messages; `recognises`: returns whether a source has this format; `rows`: lists the samples of
    a source; `uses`: the fields of `ReadOptions` that it uses.
    """

    title: str
    recognises: Callable[[str], bool]
    rows: Callable[[str, ReadOptions], Listing]
    uses: frozenset[str] = frozenset()
