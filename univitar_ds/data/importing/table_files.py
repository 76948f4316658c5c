"""Reads the records of a CSV, TSV, JSONL, JSON or Parquet file, one after another.

Text is UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. The record of a line that cannot
be read has an error message, and reading continues.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from univitar_ds.data.importing.parquet.table import read_parquet
from univitar_ds.data.importing.records import Record, Table
from univitar_ds.data.storage.local import open_regular
from univitar_ds.errors import DataError

EXTENSIONS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
"""The form of a table by the extension of its file."""
_LINE_LIMIT = 16 << 20
"""Maximum characters of a line. Otherwise a file without line breaks would fill the memory."""
_FIELD_LIMIT = 1 << 20
"""Maximum characters of a field of CSV. Otherwise an open quote would include the rest of the file."""
_JSON_LIMIT = 2 << 30
_FIRST_RECORDS = 1000
"""Number of records of JSON lines whose keys are the columns of the table."""
_DELIMITERS = ",;\t|"
_MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"))
_MARKS += ((codecs.BOM_UTF16_BE, "utf-16"),)


def read_table(path: Path, form: str | None = None) -> Table:
    """Opens a table. `form`: one of the values of `EXTENSIONS`; None: by the name of the file.

    Raises: DataError for a file that cannot be read, here and while records are read.
    """
    form = form or EXTENSIONS.get(path.suffix.lower())
    if form is None:
        raise DataError(
            f"{path}: is not a table; its name must end in {', '.join(EXTENSIONS)}, or pack it as CSV: "
            f"univitar-ds data pack {path} OUT --format csv"
        )
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; check the path")
    if form == "parquet":
        return read_parquet(path)
    if form == "json":
        return _json(path)
    records = _json_lines(path) if form == "jsonl" else _separated(path, "\t" if form == "tsv" else None)
    if form != "jsonl":
        return Table(list(next(records).fields), records)
    first = list(itertools.islice(records, _FIRST_RECORDS))
    return Table(_columns(first), itertools.chain(first, records))


def load_json(path: Path) -> Any:
    """Returns the document in a JSON file. Raises: DataError if it is not JSON or too large."""
    try:
        with open_regular(path) as stream:
            size = stream.seek(0, 2)
            if size > _JSON_LIMIT:
                raise DataError(
                    f"{path}: has {size} bytes (limit {_JSON_LIMIT}), and JSON is read whole; convert it to JSON lines"
                )
            stream.seek(0)
            return json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); correct the file") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _columns(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records if isinstance(record.fields, dict) for key in record.fields))


def _json(path: Path) -> Table:
    document = load_json(path)
    if not isinstance(document, list):
        raise DataError(
            f"{path}: holds a {type(document).__name__}; give a list of objects, JSON lines (.jsonl), or a COCO file "
            "with images and annotations"
        )
    records = [Record(f"entry {number}", _object(one)) for number, one in enumerate(document)]
    return Table(_columns(records), iter(records))


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"not an object but a {type(value).__name__}"


def _json_lines(path: Path) -> Iterator[Record]:
    with _text(path) as stream:
        for number, line in _lines(path, stream):
            if not line.strip():
                continue
            try:
                yield Record(f"line {number}", _object(json.loads(line)))
            except (ValueError, RecursionError) as error:
                yield Record(f"line {number}", f"not JSON ({error})")


def _separated(path: Path, delimiter: str | None) -> Iterator[Record]:
    """Yields the header, as a record of its names, then the records.

    Raises: DataError if the header lacks names or has one twice.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    with _text(path) as stream:
        numbered = _lines(path, stream)
        _, head = next(numbered, (0, ""))
        if delimiter is None:
            delimiter = max(_DELIMITERS, key=head.count)
        rest = (line for _, line in numbered)
        reader = csv.reader(itertools.chain([head], rest), delimiter=delimiter, strict=True)
        header = _header(path, reader)
        yield Record("line 1", dict.fromkeys(header))
        while True:
            place = f"line {reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                remedy = "quote fields and double quotes"
                if "field limit" in str(error):
                    remedy = "close an open quote, or shorten the field"
                yield Record(place, f"not CSV up to line {reader.line_num} ({error}); {remedy}")
                continue
            if not values:
                continue
            if len(values) != len(header):
                yield Record(place, f"{len(values)} fields, but the header has {len(header)}; quote fields")
                continue
            yield Record(place, dict(zip(header, values, strict=True)))


def _header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path}: its first line is not CSV ({error}); it must name the columns") from error
    if not any(header):
        raise DataError(f"{path}: is empty or has no header; its first line must name the columns")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: its header has column {twice!r} twice; give each column its own name")
    return header


@contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """Opens a text with the encoding of its byte order mark, else as UTF-8. Lines keep their ends."""
    try:
        with open_regular(path) as stream:
            start = stream.read(4)
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
        with open(path, encoding=encoding, newline="") as text:
            yield text
    except UnicodeError as error:
        raise DataError(
            f"{path}: is not {encoding.removesuffix('-sig').upper()} text ({error}); convert it, for example with "
            "iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _lines(path: Path, stream: TextIO) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        line = stream.readline(_LINE_LIMIT)
        if not line:
            return
        if len(line) == _LINE_LIMIT:
            raise DataError(f"{path}: line {number} has {_LINE_LIMIT} characters or more; is it a text file?")
        yield number, line


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check its permissions")
