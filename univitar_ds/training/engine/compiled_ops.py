"""Where DeepSpeed's compiled operations are, and the locks of their builds.

torch locks the folder of an operation with an empty file, also where the operation is compiled already, and waits for
that file silently and for ever. So the folder must be one that can be written, and a lock needs an owner that can be
looked for.
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
"""A lock without a known owner is stale once its folder has been still for so long.

The age spares a build that another machine runs in the same folder; a file of that build is written
more often than this.
"""
REPORT_AFTER_S = 5.0
_DEAD = -1
"""In the place of the id of an owner that has ended."""
_FOLDER = "TORCH_EXTENSIONS_DIR"

logger = logging.getLogger(__name__)


def prepare_extensions(
    poll_s: float = 0.5, stale_after_s: float = STALE_AFTER_S, report_after_s: float = REPORT_AFTER_S
) -> Path:
    """Gives the operations a folder that can be written: that of this environment, or else of the user's cache.

    Waits for, or clears, the locks in it. From then on, operations that are compiled in a folder that cannot be written
    are used from there without a lock, and locks say whose they are. Also makes the environment's `ninja` findable
    where the environment was not activated.

    Returns: the folder.
    """
    named = Path(os.environ.get(_FOLDER) or _own_folder())
    folder = next(filter(_writable, (named, _cache_folder())), None) or _temporary_folder()
    os.environ[_FOLDER] = str(folder)
    tools = str(Path(sys.executable).parent)
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [tools, os.environ.get("PATH")]))
    if folder != named:
        logger.info("%s cannot be written: operations that it lacks are compiled in %s", named, folder)
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
    """Until the lock is gone: its build has ended, or nothing lives that could end it, and then it is removed."""
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
    """For a user without a home. Another user could have made it, and what is compiled there is run."""
    own = Path(tempfile.gettempdir()) / f"univitar_ds-{os.getuid()}"
    with suppress(FileExistsError):
        own.mkdir(mode=0o700)
    if own.is_symlink() or own.stat().st_uid != os.getuid():
        raise InstallationError(f"{own} belongs to another user; set {_FOLDER} to a folder for compiled operations")
    return own / "torch_extensions" / _build()


def _build() -> str:
    """What a compiled operation fits: a cache outlives environments."""
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
    """Makes torch load what is compiled in these folders, and sign its locks."""
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
    """An operation out of the first of these folders in which its build has ended and that fits this torch."""
    for folder in folders:
        library = folder / name / f"{name}.so"
        if not library.is_file() or (folder / name / "lock").exists():
            continue
        spec = importlib.util.spec_from_file_location(name, library)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            logger.warning("%s does not fit this environment, and is compiled anew: %s", library, error)
            continue
        return module
    return None


def signature(pid: int) -> dict[str, Any] | None:
    """What names a process for all times; None if it is gone or cannot be seen."""
    process, machine = Process.of(pid), this_machine()
    if process is None or not machine["namespace"]:
        return None
    return {"host": machine["host"], "pids": machine["namespace"], "pid": pid, "began": process.started}


def _owner(lock: Path) -> int | None:
    """The process that holds a lock: its id, `_DEAD` if it is gone, None if that cannot be known from here."""
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
        except OSError:  # gone meanwhile, or of another user
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
            "no process of yours on this machine holds it; it is removed when its folder has been still for "
            f"{stale_after_s:g} s, since another machine may build there; if none does, remove it now"
        )
    return f"process {owner} is compiling this operation of DeepSpeed"
