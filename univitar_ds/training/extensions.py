"""Where DeepSpeed's compiled operations live, and the lock of a build that died."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

STALE_AFTER_S = 120.0
"""A lock that no process of this machine holds is stale once its folder has been still for so long.

The age spares a build that another machine runs in the same folder; a file of that build is written
more often than this.
"""


def prepare_extensions(poll_s: float = 0.5, stale_after_s: float = STALE_AFTER_S) -> Path:
    """Gives the operations a folder of this environment and waits for, or clears, locks in it.

    A build killed half-way leaves a `lock` file that every later process would wait for, silently and for
    ever. Also makes the environment's `ninja` findable where the environment was not activated.

    Returns: the folder.
    """
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "var" / "torch_extensions")))
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [tools, os.environ.get("PATH")]))
    for lock in folder.glob("*/lock"):
        while lock.exists():
            if _stale(lock, stale_after_s):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(poll_s)
    return folder


def _stale(lock: Path, stale_after_s: float) -> bool:
    newest = 0.0
    for path in lock.parent.iterdir():
        try:
            newest = max(newest, path.stat().st_mtime)
        except FileNotFoundError:  # a temporary file of a build that is alive
            return False
    return time.time() - newest > stale_after_s and not _held(lock)


def _held(lock: Path) -> bool:
    """Whether a process of this machine and user has the file open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(fd) == str(lock.resolve()) for fd in descriptors.iterdir()):
                return True
        except OSError:  # gone meanwhile, or of another user
            continue
    return False
