"""Removes the current folder from Python's search path for modules.

A user's `random.py`, `types.py` or `tokenizers/` in it would be imported instead of the real module. This file
imports only modules that are loaded when Python starts, because `__main__` calls it first.
"""

import os
import sys

PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that contains this package: a checkout or `site-packages`."""


def drop_current_folder() -> None:
    """Removes the current folder from `sys.path`, unless it contains this package, as in a checkout.

    `python -m` adds the current folder at the beginning. An empty entry of PYTHONPATH adds it in its place.
    DeepSpeed's launcher for several machines adds it to PYTHONPATH.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # the current folder was removed
        return
    if os.path.realpath(PACKAGE_PARENT) == here:
        return
    from_environment = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", os.sep).split(os.pathsep)}
    sys.path[:] = [
        entry
        for index, entry in enumerate(sys.path)
        if os.path.realpath(entry) != here or not (index == 0 or os.path.abspath(entry) in from_environment)
    ]


def safe_environment(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """Returns a copy of `environment` for a Python process that this process starts, and for its children.

    Their `sys.path` does not have the current folder, and they import this package from the same folder.
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if PACKAGE_PARENT in map(os.path.abspath, sys.path) and not PACKAGE_PARENT.endswith("-packages"):
        entries = [PACKAGE_PARENT, *(entry for entry in entries if os.path.abspath(entry) != PACKAGE_PARENT)]
    safe = {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entries)}
    if not entries:  # an empty PYTHONPATH would mean the current folder
        del safe["PYTHONPATH"]
    return safe


def protect_children() -> None:
    """Applies `safe_environment` to this process, for processes that libraries start."""
    safe = safe_environment(os.environ)
    for name in [name for name in os.environ if name not in safe]:
        del os.environ[name]
    os.environ.update(safe)
