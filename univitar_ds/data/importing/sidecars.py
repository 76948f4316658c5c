"""Reads the captions of a folder with a .txt for each media file: a/b.jpg and a/b.txt.

A file whose caption cannot be read is left out with the reason; other files are not affected.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from univitar_ds.data.importing.folders import folders_of
from univitar_ds.data.importing.rows import is_media
from univitar_ds.data.shards.captions import BYTES_LIMIT, caption_lines, decoded
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import SampleError

_log = logging.getLogger(__name__)
_MOSTLY = 0.9
"""If at least this share of the .txt files have several lines, a warning says that each line may be a caption."""


@dataclass
class Sidecars:
    """Captions by media file, and the reason for each file or folder left out; paths are relative to the folder."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def read_sidecars(folder: Path, lines: bool) -> Sidecars:
    """Reads the captions of all media files except hidden ones, in an order that depends only on their names.

    Args: lines: whether each line of a .txt is a caption; else the whole file is one.
    """
    found = Sidecars()
    several = 0
    for parent, names in folders_of(folder, found.left_out):
        texts = texts_by_stem(names)
        for name in names:
            path = Path(parent, name)
            if not is_media(name):
                continue
            file = path.relative_to(folder).as_posix()
            if path.stem not in texts:
                found.left_out[file] = "no_caption: there is no .txt of the same name"
                continue
            try:
                captions = _captions(path.with_name(texts[path.stem]))
            except SampleError as error:
                found.left_out[file] = f"{error.kind}: {texts[path.stem]}: {error}"
                continue
            several += len(captions) > 1
            found.captions[file] = captions if lines else (" ".join(captions),)
    if not lines:
        warn_of_lines(folder, several, len(found.captions))
    return found


def warn_of_lines(source: object, several: int, total: int) -> None:
    """Logs a warning if `several` of `total` .txt have several lines although each is read as one caption."""
    if several and several >= _MOSTLY * total:
        _log.warning(
            "%s: most .txt files have several lines, and each file is read as one caption; if every line is a caption, "
            "pack with --captions lines",
            source,
        )


def texts_by_stem(names: list[str]) -> dict[str, str]:
    """Returns the .txt of each stem. The extension may be in upper case; one in lower case takes precedence."""
    texts: dict[str, str] = {}
    for name in names:
        stem, dot, extension = name.rpartition(".")
        if dot and extension.lower() == "txt" and (stem not in texts or extension == "txt"):
            texts[stem] = name
    return texts


def _captions(path: Path) -> tuple[str, ...]:
    """Returns the non-blank lines of a .txt, with each run of whitespace as one space.

    Raises: SampleError if the file has no such line or cannot be read.
    """
    content = read_file(path, BYTES_LIMIT, f" (limit {BYTES_LIMIT})")
    try:
        captions = caption_lines(decoded(content))
    except UnicodeDecodeError as error:
        raise SampleError("bad_caption", f"byte {error.start} is not UTF-8 text") from error
    except UnicodeError as error:
        raise SampleError("bad_caption", f"is not UTF-8 text: {error}") from error
    if not captions:
        raise SampleError("bad_caption", "the caption is empty")
    return tuple(" ".join(caption.split()) for caption in captions)
