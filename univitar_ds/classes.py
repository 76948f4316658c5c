"""The classes of a classification run: the label spaces of its data sets, one after another.

A head has one row for each class of all sets. An item competes only with the classes of its own set: its softmax runs
over the range of its set, which computes the same as a separate head for each set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from univitar_ds.atomic_write import replace_text
from univitar_ds.errors import CheckpointError, DataError
from univitar_ds.regular_files import read_utf8


class Span(NamedTuple):
    """The range of a set's classes, from `begin` to before `end`."""

    begin: int
    end: int


class ClassList:
    """The classes of each data set. Samples that name no set belong to the set None.

    `names` maps each set to its class names in order. The class with index i of set s is row `spans[s].begin + i`.
    """

    def __init__(self, names: Mapping[str | None, Iterable[str]]) -> None:
        self.names = {name: tuple(names[name]) for name in sorted(names, key=lambda name: (name is not None, name))}

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    @cached_property
    def spans(self) -> dict[str | None, Span]:
        """The range of each set."""
        found, begin = {}, 0
        for name, classes in self.names.items():
            found[name] = Span(begin, begin + len(classes))
            begin += len(classes)
        return found

    def row(self, name: str | None, label: str | None) -> int | None:
        """Returns the row of the class `label` of set `name`; None if there is none."""
        return None if label is None else self._rows.get((name, label))

    @cached_property
    def _rows(self) -> dict[tuple[str | None, str], int]:
        return {
            (name, label): self.spans[name].begin + index
            for name, classes in self.names.items()
            for index, label in enumerate(classes)
        }

    def write(self, path: Path) -> None:
        """Writes the list as JSON. Raises: StorageError."""
        sets = [{"set": name, "classes": list(classes)} for name, classes in self.names.items()]
        replace_text(path, json.dumps({"sets": sets}, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> ClassList:
        """Reads the list that `write` wrote. Raises: CheckpointError if the file is missing or damaged."""
        try:
            sets = json.loads(read_utf8(path))["sets"]
            return cls({one["set"]: [str(name) for name in one["classes"]] for one in sets})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the classes of a run ({type(error).__name__}: {error}); restore it"
            ) from error


def class_list(labels: Iterable[tuple[str | None, str]]) -> ClassList:
    """Returns the classes that occur in pairs (set, label), sorted by name, without sets of a single class.

    Raises: DataError if no set has two classes.
    """
    found: dict[str | None, set[str]] = {}
    for name, label in labels:
        found.setdefault(name, set()).add(label)
    kept = {name: sorted(classes) for name, classes in found.items() if len(classes) > 1}
    if not kept:
        single = ", ".join(sorted(label for classes in found.values() for label in classes)) or "none"
        raise DataError(
            f"objective.kind classification needs a data set with at least 2 labels, the sources have: {single}; give "
            "sources whose samples have a label (in .json or .cls)"
        )
    return ClassList(kept)
