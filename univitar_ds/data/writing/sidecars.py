"""Reads the captions of a folder with a .txt for each media file: a/b.jpg and a/b.txt.

A file whose caption cannot be read is left out with the reason; other files are not affected.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from univitar_ds.data.shards.captions import BYTES_LIMIT, caption_lines, decoded
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import SampleError

_log = logging.getLogger(__name__)
_MEDIA = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
_LINK = "link: the folder is packed under another path, or contains the folder that is being packed"
_MOSTLY = 0.9
"""If at least this share of the .txt files have several lines, a warning says that each line may be a caption."""


@dataclass
class Sidecars:
    """Captions by media file, and the reason for each file or folder left out; paths are relative to the folder."""

    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def read_sidecars(folder: Path, lines: bool) -> Sidecars:
    """Read the captions of all media files except hidden ones, in an order that depends only on their names.

    Args: lines: whether each line of a .txt is a caption; else the whole file is one.
    """
    found = Sidecars()
    several = 0
    for parent, names in _folders(folder, found.left_out):
        texts = _texts_by_stem(names)
        for name in names:
            path = Path(parent, name)
            if path.suffix.lower().lstrip(".") not in _MEDIA:
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
    if several and not lines and several >= _MOSTLY * len(found.captions):
        _log.warning(
            "%s: most .txt files have several lines, and each file is read as one caption; if every line is a caption, "
            "pack with --captions lines",
            folder,
        )
    return found


def _folders(folder: Path, left_out: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder once, with the names of its files: first those without links, then the targets of links."""

    def unreadable(error: OSError) -> None:
        left_out[_relative(error.filename, folder)] = f"unreadable: the folder cannot be read: {error.strerror}"

    seen: set[tuple[int, int]] = set()
    root = folder.resolve()
    starts = [str(folder)]
    while starts:
        links: list[str] = []
        for start in starts:
            for parent, folders, files in os.walk(start, onerror=unreadable):
                state = os.stat(parent)
                this = (state.st_dev, state.st_ino)
                above = seen and parent == start and root.is_relative_to(os.path.realpath(parent))
                if above or this in seen:
                    left_out[_relative(parent, folder)] = _LINK
                    folders.clear()
                    continue
                seen.add(this)
                visible = sorted(name for name in folders if not name.startswith("."))
                links += [path for name in visible if os.path.islink(path := os.path.join(parent, name))]
                folders[:] = [name for name in visible if not os.path.islink(os.path.join(parent, name))]
                yield parent, sorted(name for name in files if not name.startswith("."))
        starts = links


def _relative(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()


def _texts_by_stem(names: list[str]) -> dict[str, str]:
    """The .txt of each stem, in upper or lower case; lower case takes precedence."""
    texts: dict[str, str] = {}
    for name in names:
        stem, dot, extension = name.rpartition(".")
        if dot and extension.lower() == "txt" and (stem not in texts or extension == "txt"):
            texts[stem] = name
    return texts


def _captions(path: Path) -> tuple[str, ...]:
    """The non-blank lines of a .txt, each run of whitespace as one space.

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
