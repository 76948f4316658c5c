"""The rows of a data set that every format passes to the writer, and checks that formats share."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from univitar_ds.data.shards.captions import BYTES_LIMIT, MAX_CAPTIONS
from univitar_ds.errors import DataError

MEDIA = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
"""Extensions of media files, in lower case without the dot."""
SPLIT_FOLDERS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"]
)
"""Names of folders that are splits, not classes."""
DEFAULT_SPLIT = "train"
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SPLIT_RULE = "is not a name of letters, digits, - and _ (not first), at most 64"


class Part(NamedTuple):
    """The bytes of a media file in a tar or another file: path of that file, first byte, and length in bytes."""

    file: str
    offset: int
    length: int


class Cell(NamedTuple):
    """The media in a cell of a table: path of the table, name of the column, and number of the row. `stamp`:
    `table_stamp` of the table when its records were read; `start`: folder of relative paths in it."""

    file: str
    column: str
    row: int
    stamp: tuple[int, int]
    start: str


def table_stamp(path: str | Path) -> tuple[int, int]:
    """Returns size in bytes and modification time in ns of a table. Raises: DataError if it cannot be found."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: there is no such file; check the path") from error
    return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class Row:
    """One media file. `file` is relative to the root of the listing, with slashes; if `kind` is None, the content
    determines it.

    A row has captions, a label or both. `set` names the data set of the label, if a source holds several. If `part` is
    given, the file is in a tar or a table, and `file` consists of their name and that of the member, or the row.
    """

    file: str
    kind: str | None
    captions: tuple[str, ...]
    label: str | None
    split: str
    set: str | None = None
    part: Part | Cell | None = None

    def place(self, root: Path) -> Path:
        """Returns the path of the file that holds the bytes: the file itself, its tar or its table."""
        return root / self.file if self.part is None else Path(self.part.file)


@dataclass(frozen=True)
class Listing:
    """The rows in the order of the source, the reason for each file, folder or line left out, and the folder in which
    the files are."""

    rows: list[Row]
    left_out: dict[str, str]
    root: Path


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a source.

    `format`: a name of `known_formats`; None: the format is recognised. `captions`: whether a .txt has one caption, or
    one per line. `split`: split of rows that name none; None: "train". Names of columns of tables (None and (): usual
    names are tried): `image_key` of images or videos, or of their paths, `caption_keys`, `label_key`, `split_key`.
    `images`: folder of the media of a table or COCO file. `class_names`: file with the names of class folders.
    """

    format: str | None = None
    captions: Literal["one", "lines"] = "one"
    split: str | None = None
    image_key: str | None = None
    caption_keys: tuple[str, ...] = ()
    label_key: str | None = None
    split_key: str | None = None
    images: Path | None = None
    class_names: Path | None = None

    @property
    def default_split(self) -> str:
        """The split of rows that name none."""
        return self.split or DEFAULT_SPLIT


class Fault(Exception):
    """A fault of one row. The message is the reason for which the row is left out."""


@dataclass
class Collected:
    """Collects the rows of a foreign source. A row with a fault is left out; it does not affect other rows."""

    root: Path
    left_out: dict[str, str] = field(default_factory=dict)
    _rows: dict[str, Row] = field(default_factory=dict)
    _wheres: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row, where: str) -> None:
        """Adds a row. `where` names its line for messages. Rows of one file are joined, each caption once.

        Raises: Fault if the file has been added with another split, label or set, if the row has no new caption, or if
            its tar has other media of this name.
        """
        _check_size(row.captions)
        known = self._rows.get(row.file)
        if known is None:
            self._rows[row.file], self._wheres[row.file] = row, where
            return
        first = self._wheres[row.file]
        if row.part != known.part:
            raise Fault(f"duplicate: its tar has other media named {row.file!r}; give each sample its own key")
        for name in ("split", "label", "set"):
            before, now = getattr(known, name), getattr(row, name)
            if before != now:
                raise Fault(f"duplicate: file {row.file!r} has {name} {short(before)} in {first}, {short(now)} here")
        new = tuple(caption for caption in row.captions if caption not in known.captions)
        if not new:
            raise Fault(f"duplicate: file {row.file!r} with the same texts is in {first} too")
        joined = known.captions + new
        _check_size(joined)
        self._rows[row.file] = replace(known, captions=joined)

    def listing(self, source: object) -> Listing:
        """Returns the listing. Raises: DataError if there is no row."""
        if not self._rows:
            raise DataError(f"{source} has nothing to pack{first_left_out(self.left_out)}")
        return Listing(list(self._rows.values()), self.left_out, self.root)


def first_left_out(left_out: dict[str, str]) -> str:
    """Returns the number of entries and the first one, for messages; "" if there are none."""
    first = next((f"{name}: {reason}" for name, reason in left_out.items()), None)
    return f" ({len(left_out)} left out, the first: {first})" if first else ""


def _check_size(captions: tuple[str, ...]) -> None:
    """Raises Fault if there is more text than the loader reads of a sample."""
    if len(captions) > MAX_CAPTIONS:
        raise Fault(f"bad_caption: {len(captions)} captions, at most {MAX_CAPTIONS} are read; keep fewer")
    if sum(map(len, captions)) > BYTES_LIMIT // 16 and len(json.dumps(captions)) > BYTES_LIMIT // 2:
        raise Fault(f"bad_caption: its captions take more than {BYTES_LIMIT // 2} bytes of JSON; shorten them")


def is_media(name: str) -> bool:
    """Whether a name has the extension of an image or a video."""
    return os.path.splitext(name)[1].lower().lstrip(".") in MEDIA


def checked_split(value: Any) -> str:
    """Returns the name of a split. Raises: Fault if it is not a valid name."""
    if not isinstance(value, str) or not _SPLIT.fullmatch(value):
        raise Fault(f"split {short(value)} {_SPLIT_RULE}")
    return value


def check_split(split: str | None) -> None:
    """Raises DataError if the default split of a source is not a valid name."""
    if split is not None and not _SPLIT.fullmatch(split):
        raise DataError(f"--split {split!r} {_SPLIT_RULE}")


def label_of(value: Any) -> str | None:
    """Returns the label of a row as text, None for None and an empty text. Raises: Fault for other values."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (isinstance(value, float) and value != value):  # NaN: a missing value in a Parquet file
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Fault(f"label {short(value)} is not text")
    return str(value).strip() or None


def captions_of(value: Any) -> tuple[str, ...]:
    """Returns the captions in a field of a foreign table: a text or a list of texts, without empty ones.

    Raises: Fault for other values.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    found = []
    for one in values:
        if one is None or (isinstance(one, float) and one != one):
            continue
        if not isinstance(one, str):
            raise Fault(f"caption {short(one)} is not text")
        if one.strip():
            found.append(one.strip())
    return tuple(dict.fromkeys(found))


def file_inside(root: Path, value: Any, start: Path, above: Path) -> str:
    """Returns the path of an existing file relative to `root`.

    A relative path starts in `start`, or in `above` if it begins with `..`. The file must be inside `root`, also if
    the path is absolute: a foreign table must not name other files of this machine. Links are followed wherever they
    lead, as in all folders: copies of the hub's cache consist of links. Pack no folder whose links you do not trust.

    Raises: Fault if the value is not such a path, or the file does not exist.
    """
    if not isinstance(value, str) or not value or "\0" in value:
        raise Fault(f"file {short(value)} is not a path")
    if "://" in value:
        raise Fault(f"file {short(value)} is an address; download the files first, for example with img2dataset")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(os.path.abspath(above if value.startswith("../") else start), value))
    if not Path(path).is_relative_to(base):
        raise Fault(f"file {short(value)} is outside of {base}; give the folder of the files with --images FOLDER")
    if not _is_file(path):
        raise Fault(f"file {short(value)} is missing (no file {path})")
    return Path(path).relative_to(base).as_posix()


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def short(value: Any) -> str:
    """Returns a value for messages, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
