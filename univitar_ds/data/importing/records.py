"""The records of a table, as all forms of tables give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Embedded(NamedTuple):
    """An image or video that is in the table itself: the number of its row, and the name of its file ("" if unknown).

    Its bytes are not read with the record; see `parquet.media`.
    """

    row: int
    name: str

    def __repr__(self) -> str:
        return "(an image or video)"


class Unreadable(NamedTuple):
    """A value that is not read. `reason` follows the name of its column in messages."""

    reason: str

    def __repr__(self) -> str:
        return f"(it {self.reason})"


class Record(NamedTuple):
    """A record: the place for messages (`line 3`), and its fields, or the reason why it cannot be read."""

    place: str
    fields: dict[str, Any] | str


class Table(NamedTuple):
    """The columns of a table, and its records. Records of JSON may lack columns or have others.

    `files`: columns that hold files, whose fields are `Embedded`; `binary`: columns of bytes, whose fields are
    `Embedded` too, but which may be anything; `class_names`: the names of the numbers in columns of labels.
    """

    columns: list[str]
    records: Iterator[Record]
    files: Sequence[str] = ()
    binary: Sequence[str] = ()
    class_names: Mapping[str, Sequence[str]] = {}
