"""Files and folders that appear under their name only when they are whole.

Readers, also after a crash, see the earlier file or the new one. Every module that promises this does
it here.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from univitar_ds.errors import writing


@contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """A name beside `path` for the file that is to be written; it becomes `path` when the body is done.

    The name is `.{name}.partial`, which `owned` recognises as the program's own.

    Args: durable: see `move_into_place`; shared: processes that know nothing of each other may write `path` at the same
        time, so each has its own name.
    Raises: StorageError for what the storage refuses; then `path` is as it was.
    """
    own = f".{uuid.uuid4().hex}" if shared else ""
    partial = path.with_name(f".{path.name.lstrip('.')}{own}.partial")
    with writing(path):
        try:
            with suppress(FileNotFoundError):
                os.unlink(partial)  # it may be a link, which must not be written through
            yield partial
            move_into_place(partial, path, durable=durable)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise


def replace_bytes(path: Path, content: bytes, *, durable: bool = False) -> Path:
    """Write a file whole, see `replacing`. Raises: StorageError."""
    with replacing(path, durable=durable) as partial:
        partial.write_bytes(content)
    return path


def replace_text(path: Path, text: str) -> Path:
    """Write a file whole, as UTF-8. Raises: StorageError."""
    return replace_bytes(path, text.encode("utf-8"))


def move_into_place(partial: str | Path, path: str | Path, *, durable: bool = False) -> None:
    """Rename a finished file over `path`, or a finished folder to a name that is free or an empty folder's.

    Args: durable: the content is on the disk before the name is, and the name when this returns, so that a power cut
        leaves no half of it. A folder's files are synced by the one who writes them.
    Raises: OSError.
    """
    if durable:
        sync(partial)
    os.replace(partial, path)
    if durable:
        sync(os.path.dirname(path) or ".")


def sync(path: str | Path) -> None:
    """Flush a file or folder to the disk. Raises: OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):  # some network file systems sync no folder
            raise
    finally:
        os.close(descriptor)
