"""Temporary folders of a process. The process that created one holds a lock on it, which shows other processes
that it is used. The folders of killed processes are removed by the next process that creates one there.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_LOCK = "owner.lock"
_REMOVALS = 3


class LockedFolder:
    """A new folder in `parent` whose name begins with `prefix`. It is removed by `remove`, or when the process exits.

    Raises: OSError if it cannot be created.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        remove_abandoned(parent, prefix)
        self._owner = os.getpid()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(self.path / _LOCK)
            except (BlockingIOError, FileNotFoundError):  # another process took it for abandoned before the lock
                os.close(lock)
                continue
            self._lock = lock
            atexit.register(self.remove)
            return

    def remove(self) -> None:
        """Removes the folder and all that is in it. Does nothing in a forked process, or if it was called before."""
        if os.getpid() != self._owner or self._lock is None:
            return
        atexit.unregister(self.remove)
        for _ in range(_REMOVALS):  # a running thread may create files during the removal
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders in `parent` that processes which have ended left there."""
    for folder in parent.glob(prefix + "*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
