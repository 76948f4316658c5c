"""Reads the records of a Parquet table without the bytes of the images and videos that it contains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from univitar_ds.data.importing.parquet.schema import MEDIA, class_names, features_of
from univitar_ds.data.importing.records import Embedded, Record, Table, Unreadable
from univitar_ds.data.importing.rows import short
from univitar_ds.errors import DataError
from univitar_ds.extras import extra

BYTES, PATH = "bytes", "path"
"""The fields of the struct in which `datasets` stores a file."""
_BUFFER = 1 << 20
_BATCH_ROWS, _BATCH_BYTES = 1024, 64 << 20
"""Maximum number of rows that are decoded together, and of their bytes, estimated from the average size of a row."""
_NESTED = Unreadable("holds bytes inside another type, such as a list; a row must have one file")
_UNDECODABLE = Unreadable("cannot be read; is it text in UTF-8?")


def open_parquet(path: Path) -> Any:
    """Opens a Parquet file to be read page by page. Raises: DataError if it cannot be read or is not a Parquet file."""
    with extra("parquet"):
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    try:
        file = ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        file.schema_arrow  # noqa: B018 - the schema is parsed on first use
        return file
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: is not a Parquet file that can be read ({error}); restore it") from error


def read_parquet(path: Path) -> Table:
    """Opens a table. Columns with media have the type `binary` or are structs with a field `bytes`.

    Raises: DataError if the file cannot be read or two columns have the same name; also while records are read, if the
        file is damaged.
    """
    file = open_parquet(path)
    schema = file.schema_arrow
    twice = next((name for name, count in Counter(schema.names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: has column {short(twice)} twice; give each column its own name")
    features = features_of(path, schema.metadata)
    kinds = {field.name: _kind(field.type) for field in schema}
    types = {name: features.get(name, {}).get("_type") for name in kinds}
    files = [
        name
        for name, kind in kinds.items()
        if (kind == "file" and types[name] in (None, *MEDIA)) or (kind == "binary" and types[name] in MEDIA)
    ]
    binary = [name for name, kind in kinds.items() if kind == "binary" and name not in files]
    records = _records(path, file, kinds, [*files, *binary])
    named = class_names(path, {name: feature for name, feature in features.items() if name in kinds})
    return Table(list(schema.names), records, files, binary, named)


def batch_rows(file: Any, groups: Sequence[int]) -> int:
    """Returns the number of rows to decode together. Args: groups: indices of the row groups that are read."""
    row_bytes = 1
    for group in groups:
        metadata = file.metadata.row_group(group)
        row_bytes = max(row_bytes, metadata.total_byte_size // max(metadata.num_rows, 1))
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))


def _kind(type_: Any) -> str:
    """Returns "file" for a struct with the bytes of a file, "binary" for bytes, "holds binary" for other types that
    contain bytes, and "value" for types without bytes."""
    type_ = getattr(type_, "storage_type", type_)
    type_ = getattr(type_, "value_type", type_) if str(type_).startswith("dictionary<") else type_
    if _is_binary(type_):
        return "binary"
    children = [type_.field(index) for index in range(type_.num_fields)]
    if str(type_).startswith("struct<") and any(one.name == BYTES and _is_binary(one.type) for one in children):
        return "file"
    return "holds binary" if any(_kind(one.type) != "value" for one in children) else "value"


def _is_binary(type_: Any) -> bool:
    return str(type_) in ("binary", "large_binary", "binary_view")


def _records(path: Path, file: Any, kinds: Mapping[str, str], embedded: Sequence[str]) -> Iterator[Record]:
    from pyarrow import ArrowException

    read = [name for name, kind in kinds.items() if kind == "value"]
    named = [name for name in embedded if kinds[name] == "file"]
    others = {name: _NESTED for name, kind in kinds.items() if kind != "value" and name not in embedded}
    number = 0
    try:
        size = batch_rows(file, range(file.num_row_groups))
        for batch in file.iter_batches(size, columns=[*read, *(f"{name}.{PATH}" for name in named)]):
            columns = {field.name: _values(column) for field, column in zip(batch.schema, batch, strict=True)}
            for index in range(batch.num_rows):
                fields = {name: values[index] for name, values in columns.items()} | others
                fields |= {name: Embedded(number, _name_in(fields.get(name))) for name in embedded}
                yield Record(f"row {number}", fields)
                number += 1
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: is damaged from row {number} on ({error}); restore it") from error


def _name_in(file: Any) -> str:
    """Returns the path in a struct that was read without its bytes; "" if it has no path."""
    path = file.get(PATH) if isinstance(file, dict) else None
    return path if isinstance(path, str) else ""


def _values(column: Any) -> list[Any]:
    """Returns the values of a column. A value that Python cannot represent does not affect the others."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError, TypeError):
        return [_value(one) for one in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, TypeError):
        return _UNDECODABLE
