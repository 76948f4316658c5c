"""Where Python looks for modules: never in the current folder.

A user's `random.py`, `types.py` or `tokenizers/` there would be imported instead of the real one. Imports nothing
that is not in memory when Python has started: `__main__` calls this before everything else.
"""

import os
import sys

PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds this package: of a checkout, or `site-packages`."""


def drop_current_folder() -> None:
    """Takes the current folder off `sys.path`, unless this package is in it: then the user runs a checkout.

    `python -m` adds it at the beginning, an empty entry of PYTHONPATH anywhere, and DeepSpeed's launcher of several
    machines adds it to PYTHONPATH.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it has been removed
        return
    if os.path.realpath(PACKAGE_PARENT) == here:
        return
    asked = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", os.sep).split(os.pathsep)}
    sys.path[:] = [
        entry
        for index, entry in enumerate(sys.path)
        if os.path.realpath(entry) != here or not (index == 0 or os.path.abspath(entry) in asked)
    ]


def safe_environment(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """`environment` for a Python process that this one starts, and for its children.

    The current folder is not on its `sys.path`; this package is found in the same place.
    """
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if PACKAGE_PARENT in map(os.path.abspath, sys.path) and not PACKAGE_PARENT.endswith("-packages"):
        entries = [PACKAGE_PARENT, *(entry for entry in entries if os.path.abspath(entry) != PACKAGE_PARENT)]
    safe = {**environment, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(entries)}
    if not entries:  # an empty one would be the current folder
        del safe["PYTHONPATH"]
    return safe


def protect_children() -> None:
    """Applies `safe_environment` to this process, for processes that libraries start."""
    safe = safe_environment(os.environ)
    for name in [name for name in os.environ if name not in safe]:
        del os.environ[name]
    os.environ.update(safe)
