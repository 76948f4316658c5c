"""The folders of DeepSpeed's compiled operations, and the locks of their builds.

torch locks the folder of an operation with an empty file, even if the operation is compiled already, and waits for
that file silently and without a limit. So the folder must be writable, and a lock must name an owner that can be
checked.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from univitar_ds.errors import InstallationError
from univitar_ds.identity import this_machine
from univitar_ds.processes import Process

STALE_AFTER_S = 120.0
"""A lock without a known owner is stale once nothing in its folder has changed for so long.

The age protects a build that another machine runs in the same folder, which writes files more often.
"""
REPORT_AFTER_S = 5.0
_DEAD = -1
"""Returned instead of a process id if the owner has ended."""
_FOLDER = "TORCH_EXTENSIONS_DIR"

logger = logging.getLogger(__name__)


def prepare_extensions(
    poll_s: float = 0.5, stale_after_s: float = STALE_AFTER_S, report_after_s: float = REPORT_AFTER_S
) -> Path:
    """Gives the operations a writable folder: that of this environment, else one in the user's cache.

    Waits for, or clears, the locks in it. From then on, operations compiled in a read-only folder are loaded from there
    without a lock, and locks contain their owner. Also adds the environment's `ninja` to PATH if the environment is not
    activated.

    Returns: the folder.
    """
    named = Path(os.environ.get(_FOLDER) or _own_folder())
    folder = next(filter(_writable, (named, _cache_folder())), None) or _temporary_folder()
    os.environ[_FOLDER] = str(folder)
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [tools, os.environ.get("PATH")]))
    if folder != named:
        logger.info("%s cannot be written: missing operations are compiled in %s", named, folder)
    for lock in folder.glob("*/lock"):
        wait_for(lock, poll_s, stale_after_s, report_after_s)
    _patch_torch([place for place in (named, _own_folder()) if place != folder])
    return folder


def wait_for(
    lock: Path,
    poll_s: float = 0.5,
    stale_after_s: float = STALE_AFTER_S,
    report_after_s: float = REPORT_AFTER_S,
) -> None:
    """Waits until the lock is gone. A lock that no live process could end is removed."""
    start, reported = time.monotonic(), False
    while lock.exists():
        owner = _owner(lock)
        if owner == _DEAD or (owner is None and _still(lock, stale_after_s)):
            logger.warning("%s was left by a build that was killed, and is removed", lock)
            lock.unlink(missing_ok=True)
            return
        if not reported and time.monotonic() - start >= report_after_s:
            reported = True
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning("waiting for %s: %s", lock, _reason(owner, stale_after_s))
        time.sleep(poll_s)


def _own_folder() -> Path:
    return Path(sys.prefix) / "var" / "torch_extensions"


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "univitar_ds" / "torch_extensions" / _build()


def _temporary_folder() -> Path:
    """For a user without a home. Code from this folder is run, so it must not belong to another user."""
    own = Path(tempfile.gettempdir()) / f"univitar_ds-{os.getuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise InstallationError(f"{own} belongs to another user; set {_FOLDER} to a folder for compiled operations")
    return own / "torch_extensions" / _build()


def _build() -> str:
    """The versions that a compiled operation depends on, since a cache outlives environments."""
    versions = (f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    return "-".join([f"python{platform.python_version()}", *versions])


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _patch_torch(elsewhere: list[Path]) -> None:
    """Makes torch load compiled operations from these folders, and write its owner into each lock."""
    from torch.utils import cpp_extension

    class Baton(cpp_extension.FileBaton):
        def try_acquire(self) -> bool:
            try:
                acquired = bool(super().try_acquire())
            except OSError as error:
                raise InstallationError(
                    f"{Path(self.lock_file_path).parent} cannot be written ({error.strerror}) and an operation of "
                    f"DeepSpeed has to be compiled; set {_FOLDER} to a folder that can"
                ) from error
            if acquired:
                with suppress(OSError):
                    Path(self.lock_file_path).write_text(json.dumps(signature(os.getpid())), encoding="utf-8")
            return acquired

        def wait(self) -> None:
            wait_for(Path(self.lock_file_path))

    build = getattr(cpp_extension.load, "build", cpp_extension.load)

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return compiled(name, elsewhere) or build(name, *arguments, **options)

    load.build = build
    cpp_extension.FileBaton, cpp_extension.load = Baton, load


def compiled(name: str, folders: list[Path]) -> ModuleType | None:
    """An operation from the first of these folders with a finished build that fits this torch."""
    for folder in folders:
        library = folder / name / f"{name}.so"
        if not library.is_file() or (folder / name / "lock").exists():
            continue
        spec = importlib.util.spec_from_file_location(name, library)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            logger.warning("%s does not fit this environment, and is compiled again: %s", library, error)
            continue
        return module
    return None


def signature(pid: int) -> dict[str, Any] | None:
    """A unique identification of a process; None if it is gone or not visible."""
    process, machine = Process.of(pid), this_machine()
    if process is None or not machine["namespace"]:
        return None
    return {"host": machine["host"], "pids": machine["namespace"], "pid": pid, "began": process.started}


def _owner(lock: Path) -> int | None:
    """The id of the process that holds a lock; `_DEAD` if it is gone, None if it is unknown."""
    try:
        written = json.loads(lock.read_text(encoding="utf-8"))
        here = signature(os.getpid())
        if here and (written["host"], written["pids"]) == (here["host"], here["pids"]):
            return written["pid"] if signature(written["pid"]) == written else _DEAD
        return None
    except (OSError, ValueError, KeyError, TypeError):  # unsigned, as torch leaves it
        return _holder(lock)


def _holder(lock: Path) -> int | None:
    """A process of this machine and user that has the file open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(fd) == str(lock.resolve()) for fd in descriptors.iterdir()):
                return int(descriptors.parent.name)
        except OSError:  # ended since, or of another user
            continue
    return None


def _still(lock: Path, stale_after_s: float) -> bool:
    newest = 0.0
    try:
        for path in lock.parent.iterdir():
            newest = max(newest, path.stat().st_mtime)
    except FileNotFoundError:  # a temporary file of a build that is alive
        return False
    return time.time() - newest > stale_after_s


def _reason(owner: int | None, stale_after_s: float) -> str:
    if owner is None:
        return (
            "no process of yours on this machine holds it; it is removed once its folder is unchanged for "
            f"{stale_after_s:g} s, since another machine may build there; if none does, remove it now"
        )
    return f"process {owner} is compiling this operation of DeepSpeed"
