"""Names for labels that are class numbers, read from a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from univitar_ds.data.storage.address import check_address, storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import DataError, SampleError

_MAX_BYTES = 16 << 20
_NUMBERED = re.compile(r"(\d{1,9})\s*[\t ,;:]\s*(\S.*)")
_WORDNET = re.compile(r"n\d{8}[\t ,;:]")
_FORM = "give a class name per line, line 1 for class 0, or lines of an index, a tab and a name"


def read_class_names(path: str, settings: StorageSettings) -> tuple[str, ...]:
    """Reads the names of classes 0, 1, ... from a local file or from S3. Each UTF-8 line is a name, or an index and a
    name. JSON is a list of names, or an object that maps indices to names or names to indices.

    Raises: DataError if the file cannot be read, a line is empty, or the indices of n classes are not 0 to n - 1.
    """
    check_address(path)
    storage = storage_for(path, settings)
    if (size := storage.size(path)) > _MAX_BYTES:
        raise DataError(f"{path}: has {size} bytes (limit {_MAX_BYTES}); give a text file with a class name per line")
    try:
        text = storage.read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text; give a class name per line") from error
    document = _json(text)
    return _of_lines(path, text) if document is None else _of_json(path, document)


def shared_names(names: Sequence[str]) -> str | None:
    """Returns a warning about names that several classes share; None if all names differ."""
    shared = [name for name, count in Counter(names).items() if count > 1]
    if not shared:
        return None
    classes = " and ".join(str(index) for index, name in enumerate(names) if name == shared[0])
    more = f" ({len(shared)} such names)" if len(shared) > 1 else ""
    return f"classes {classes} have the same name, {shared[0]!r}{more}, and count as one; give each its own name"


def _json(text: str) -> list[Any] | dict[str, Any] | None:
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # the first name of a text file may begin with a bracket


def _of_json(path: str, document: list[Any] | dict[str, Any]) -> tuple[str, ...]:
    if isinstance(document, list):
        numbered = dict(enumerate(document))
    elif all(isinstance(value, int) for value in document.values()):  # name: index
        return _ordered(path, [(index, name) for name, index in document.items()])
    elif all(key.isascii() and key.isdigit() and len(key) < 10 for key in document):
        numbered = {int(key): value for key, value in document.items()}
    else:
        raise DataError(f"{path}: is JSON without an index for each name; {_FORM}")
    for index, name in numbered.items():
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{path}: class {index} is {str(name)[:60]!r} ({type(name).__name__}), not a name; {_FORM}")
    return _ordered(path, list(numbered.items()))


def _of_lines(path: str, text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines:
        raise DataError(f"{path}: line {lines.index('') + 1} is empty; line 1 names class 0, line 2 class 1, and so on")
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if all(numbered):
        return _ordered(path, [(int(match[1]), match[2]) for match in numbered if match])
    column = next((number for number, line in enumerate(lines, 1) if "\t" in line or _WORDNET.match(line)), None)
    if column is not None:
        raise DataError(f"{path}: line {column} is {lines[column - 1][:60]!r}, more than a name; {_FORM}")
    return tuple(lines)


def _ordered(path: str, numbered: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Returns the names in the order of their indices. Raises: DataError unless all of 0 to n - 1 occur once."""
    counts = Counter(index for index, _ in numbered)
    twice = next((index for index, count in counts.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: index {twice} is given {counts[twice]} times; give each class one name, or {_FORM}")
    missing = next((index for index in range(len(numbered)) if index not in counts), None)
    if not numbered:
        raise DataError(f"{path}: names no class; {_FORM}")
    if missing is not None:
        raise DataError(
            f"{path}: its {len(numbered)} lines are numbered, but not from 0 to {len(numbered) - 1} (there is no "
            f"{missing}): number them from 0, or, if numbers belong to the names, put an index and a tab before each"
        )
    by_index: Mapping[int, str] = dict(numbered)
    return tuple(by_index[index].strip() for index in range(len(numbered)))


def named(label: str | None, names: Sequence[str]) -> str | None:
    """Returns the class name of a label that is a number or a class name. Without `names`, returns `label`.

    Raises: SampleError for any other label.
    """
    if label is None or not names:
        return label
    if label.isascii() and label.isdigit() and len(label) < 20:  # `int` fails for thousands of digits
        if int(label) < len(names):
            return names[int(label)]
    elif label in names:
        return label
    raise SampleError("bad_label", f"its label {label[:60]!r} is none of the {len(names)} of its source's class_names")
