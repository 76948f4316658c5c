"""Writes files and folders atomically: they get their name only when they are complete.

Readers see the earlier file or the complete new file, even after a crash.
"""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from univitar_ds.errors import writing


@contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` for the body to write. Renames the written file to `path` after the body.

    The name is `.{name}.partial`, which `owned` recognises as a file of the program.

    Args: durable: see `move_into_place`; shared: whether independent processes may write `path` at the same time.
        Then each process writes a partial file of its own.
    Raises: StorageError if the storage fails; `path` is unchanged then, as after any error.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.name.lstrip('.')}{own}.partial")
    with writing(path):
        try:
            with suppress(FileNotFoundError):
                os.unlink(partial)  # an earlier partial file may be a link, which must not be written through
            yield partial
            move_into_place(partial, path, durable=durable)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def replace_bytes(path: Path, content: bytes, *, durable: bool = False) -> Path:
    """Writes a file atomically, see `replacing`. Returns `path`. Raises: StorageError."""
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content)
    return path


def replace_text(path: Path, text: str) -> Path:
    """Writes a file atomically, as UTF-8. Returns `path`. Raises: StorageError."""
    return replace_bytes(path, text.encode("utf-8"))


def move_into_place(partial: str | Path, path: str | Path, *, durable: bool = False) -> None:
    """Renames a finished file or folder to `path`. A folder must not be renamed to a folder that has entries.

    Args: durable: whether to sync the content before the renaming and the parent folder after it, so that `path` is
        complete even after a power failure. The caller must sync the files in a folder.
    Raises: OSError if the storage fails.
    """
    if durable:
        sync(partial)
    os.replace(partial, path)
    if durable:
        sync(os.path.dirname(path) or ".")


def sync(path: str | Path) -> None:
    """Flushes a file or folder to the disk. Raises: OSError if the storage fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def takes_files(folder: Path) -> bool:
    """Whether files can be created in a folder, which is made if it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
