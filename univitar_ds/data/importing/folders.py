"""Walks folders of media files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_LINK = "link: the folder is packed under another path, or contains the folder that is being packed"


def folders_of(
    folder: Path, left_out: dict[str, str], *, deepest: int | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder once, with the names of its files. Targets of links come last.

    Hidden files and folders are left out. `left_out` gets the folders that cannot be read or were yielded before.
    `deepest`: how many folders below `folder` are entered (None: all).
    """

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
                if deepest is not None and len(Path(parent).relative_to(folder).parts) >= deepest:
                    folders.clear()
                visible = sorted(name for name in folders if not name.startswith("."))
                links += [path for name in visible if os.path.islink(path := os.path.join(parent, name))]
                folders[:] = [name for name in visible if not os.path.islink(os.path.join(parent, name))]
                yield parent, sorted(name for name in files if not name.startswith("."))
        starts = links


def _relative(path: str, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()
