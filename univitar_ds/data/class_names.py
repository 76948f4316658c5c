"""What the numbers stand for that many data sets have as labels: line 0 of a text file names class 0."""

from __future__ import annotations

import os
from collections.abc import Sequence

from univitar_ds.data.storage import StorageSettings, storage_for
from univitar_ds.errors import DataError, SampleError

_MOST_BYTES = 16 << 20


def read_class_names(path: str, settings: StorageSettings) -> tuple[str, ...]:
    """The lines of a UTF-8 file, local or on S3.

    Raises: DataError if it cannot be read, or a line is empty.
    """
    path = os.path.expanduser(path)
    storage = storage_for(path, settings)
    if (size := storage.size(path)) > _MOST_BYTES:
        raise DataError(f"{path}: has {size} bytes (limit {_MOST_BYTES}); give a text file with a class name per line")
    try:
        names = [line.strip() for line in storage.read(path).decode("utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8 text; give a class name per line") from error
    if "" in names:
        raise DataError(f"{path}: line {names.index('') + 1} is empty; line 1 names class 0, line 2 class 1, and so on")
    return tuple(names)


def named(label: str | None, names: Sequence[str]) -> str | None:
    """The name of a label that is a number; one that is a name already stays.

    Raises: SampleError for a label that has no name; nothing has where there are no names at all.
    """
    if label is None or not names:
        return label
    if label.isascii() and label.isdigit() and len(label) < 20:  # Python converts no number of thousands of digits
        if int(label) < len(names):
            return names[int(label)]
    elif label in names:
        return label
    raise SampleError("bad_label", f"its label {label[:60]!r} is none of the {len(names)} of its source's class_names")
