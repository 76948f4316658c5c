"""The folders of DeepSpeed's compiled operations, and the locks of their builds.

torch locks the folder of an operation with an empty file, even if the operation is already compiled, and waits silently
and without a limit until this file is removed. The folder must therefore be writable, and each lock must name its owner
so that other processes can check whether it is still alive.
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
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from univitar_ds.atomic_write import takes_files
from univitar_ds.config.paths import user_cache
from univitar_ds.errors import InstallationError
from univitar_ds.identity import this_machine
from univitar_ds.processes import Process

STALE_AFTER_S = 120.0
"""Seconds without a change in the folder of a lock after which a lock without a known owner is stale.

The limit protects a build on another machine in the same folder, which writes files more often.
"""
REPORT_AFTER_S = 5.0
"""Seconds of waiting for a lock after which the wait is logged."""
_DEAD = -1
"""Returned instead of a process id if the owner has ended."""
_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""Environment variable of torch with the folder of compiled operations."""

logger = logging.getLogger(__name__)


def prepare_extensions(
    poll_s: float = 0.5, stale_after_s: float = STALE_AFTER_S, report_after_s: float = REPORT_AFTER_S
) -> Path:
    """Selects a writable folder for compiled operations: TORCH_EXTENSIONS_DIR or, if it is not set, a folder in the
    Python environment; else one in the user's cache; else a temporary one.

    Waits for the locks in the folder, and removes stale locks. Afterwards torch loads operations that a read-only
    folder has without a lock, and the locks that it creates name their owner. Also adds the folder of the environment's
    `ninja` to PATH, since the environment may not be activated.

    Returns: the folder.
    Raises: InstallationError if only the temporary folder is left and belongs to another user.
    """
    preferred = folders()[0]
    folder = next(filter(takes_files, folders()), None) or _temporary_folder()
    os.environ[_VARIABLE] = str(folder)
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [tools, os.environ.get("PATH")]))
    if folder != preferred:
        logger.info("%s is not writable: missing operations are compiled in %s", preferred, folder)
    for lock in folder.glob("*/lock"):
        wait_for(lock, poll_s, stale_after_s, report_after_s)
    _patch_torch([other for other in (preferred, _environment_folder()) if other != folder])
    return folder


def folders() -> list[Path]:
    """Returns the folders for compiled operations, of which the first writable one is used."""
    return [Path(os.environ.get(_VARIABLE) or _environment_folder()), _cache_folder()]


class LockState(Enum):
    """HELD: by a build, possibly on another machine; STALE: left by a killed build; GONE: removed meanwhile."""

    HELD = "held"
    STALE = "stale"
    GONE = "gone"


def lock_state(lock: Path, stale_after_s: float = STALE_AFTER_S) -> tuple[LockState, str]:
    """Returns the state of a lock, and for a held one a sentence about its owner."""
    if not lock.exists():
        return LockState.GONE, ""
    owner = _owner(lock)
    if owner == _DEAD or (owner is None and _unchanged(lock, stale_after_s)):
        return LockState.STALE, ""
    return LockState.HELD, _reason(owner, stale_after_s)


def wait_for(
    lock: Path,
    poll_s: float = 0.5,
    stale_after_s: float = STALE_AFTER_S,
    report_after_s: float = REPORT_AFTER_S,
) -> None:
    """Waits until the lock is removed, and removes it if the owner has ended or the lock is stale (STALE_AFTER_S)."""
    start, reported = time.monotonic(), False
    while True:
        state, reason = lock_state(lock, stale_after_s)
        if state is LockState.GONE:
            return
        if state is LockState.STALE:
            logger.warning("%s was left by a killed build and is removed", lock)
            lock.unlink(missing_ok=True)
            return
        if not reported and time.monotonic() - start >= report_after_s:
            reported = True
            if os.environ.get("LOCAL_RANK", "0") == "0":
                logger.info("waiting for %s: %s", lock, reason)
        time.sleep(poll_s)


def _environment_folder() -> Path:
    return Path(sys.prefix) / "var" / "torch_extensions"


def _cache_folder() -> Path:
    return user_cache() / "torch_extensions" / _build_versions()


def _temporary_folder() -> Path:
    """Returns a folder for a user without a writable home.

    Code from this folder is run. Raises: InstallationError if the folder belongs to another user."""
    own = Path(tempfile.gettempdir()) / f"univitar_ds-{os.getuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise InstallationError(f"{own} belongs to another user; set {_VARIABLE} to a folder for compiled operations")
    return own / "torch_extensions" / _build_versions()


def _build_versions() -> str:
    """Returns a folder name with the versions that a compiled operation depends on: a cache outlives environments."""
    versions = (f"{name}{importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    return "-".join([f"python{platform.python_version()}", *versions])


def _patch_torch(other_folders: list[Path]) -> None:
    """Makes torch load compiled operations from `other_folders`, and write the owner into each lock."""
    from torch.utils import cpp_extension

    class Baton(cpp_extension.FileBaton):
        def try_acquire(self) -> bool:
            try:
                acquired = bool(super().try_acquire())
            except OSError as error:
                raise InstallationError(
                    f"{Path(self.lock_file_path).parent} cannot be written ({error.strerror}) and an operation of "
                    f"DeepSpeed has to be compiled; set {_VARIABLE} to a writable folder"
                ) from error
            if acquired:
                with suppress(OSError):
                    Path(self.lock_file_path).write_text(json.dumps(signature(os.getpid())), encoding="utf-8")
            return acquired

        def wait(self) -> None:
            wait_for(Path(self.lock_file_path))

    build = getattr(cpp_extension.load, "build", cpp_extension.load)

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return compiled(name, other_folders) or build(name, *arguments, **options)

    load.build = build
    cpp_extension.FileBaton, cpp_extension.load = Baton, load


def compiled(name: str, folders: list[Path]) -> ModuleType | None:
    """Loads an operation from the first of `folders` with a finished build that fits this torch; None without one."""
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
    """Returns the content of a lock of process `pid`, unique to the process; None if it has ended or is not visible."""
    process, machine = Process.of(pid), this_machine()
    if process is None or not machine["namespace"]:
        return None
    return {"host": machine["host"], "pids": machine["namespace"], "pid": pid, "began": process.started}


def _owner(lock: Path) -> int | None:
    """Returns the id of the process that holds a lock; `_DEAD` if the process has ended, None if it is unknown."""
    try:
        written = json.loads(lock.read_text(encoding="utf-8"))
        here = signature(os.getpid())
        if here and (written["host"], written["pids"]) == (here["host"], here["pids"]):
            return written["pid"] if signature(written["pid"]) == written else _DEAD
        return None
    except (OSError, ValueError, KeyError, TypeError):  # a lock of torch itself has no owner
        return _process_with_open(lock)


def _process_with_open(lock: Path) -> int | None:
    """Returns the id of a process of this machine and user that has the file open; None without one."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.path.realpath(fd) == str(lock.resolve()) for fd in descriptors.iterdir()):
                return int(descriptors.parent.name)
        except OSError:  # the process has ended or belongs to another user
            continue
    return None


def _unchanged(lock: Path, stale_after_s: float) -> bool:
    """Returns whether no file in the folder of the lock has changed for `stale_after_s` seconds."""
    newest = 0.0
    try:
        for path in lock.parent.iterdir():
            newest = max(newest, path.stat().st_mtime)
    except FileNotFoundError:  # a live build has removed a temporary file
        return False
    return time.time() - newest > stale_after_s


def _reason(owner: int | None, stale_after_s: float) -> str:
    if owner is None:
        return (
            "none of your processes on this machine holds this lock; it is removed once its folder is unchanged for "
            f"{stale_after_s:g} s, since another machine may build there; if no machine does, remove the lock now"
        )
    return f"process {owner} is compiling this operation of DeepSpeed"
