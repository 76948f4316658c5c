"""Creates or reuses the folder of `make demo`, and removes the files that the demo wrote there (`make clean`).

Needs no installed packages, because `make clean` must also work without the environment.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from univitar_ds.config.run_folder import LOCKS, RUN_ENTRIES
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.owned import MARK, Names, clear, foreign, is_empty, is_marked, mark, refuse_link, remove
from univitar_ds.reporting.page_file import is_page
from univitar_ds.run_lock import RunLock

KIND = "demo"
"""Kind of the marker file in the folder of a demo."""
RUN = Path("runs", "demo")
PAGE = "report.html"
_RUN: Names = RUN_ENTRIES | LOCKS
_SCENE = r"(train|test)-\d{6}\.(png|jpg|mp4)"
_ENTRIES: Names = {
    re.escape(MARK): None,
    re.escape(PAGE): None,
    "scenes": {r"scenes\.json|metadata\.jsonl(\.partial)?": None, "images": {_SCENE: None}, "videos": {_SCENE: None}},
    "shards": {r"manifest\.json|\.pack\.(jsonl|lock)|(train|test)-(image|video)-\d{6}\.tar": None},
    "runs": {"demo": _RUN},
}


def claim(folder: Path) -> None:
    """Creates or reuses the demo's folder. Removes the run of an earlier demo in it.

    Raises: ConfigError if the folder or its run contains files that no demo writes, or is a link to a folder that is
        not empty; RunLocked if a demo is training in it.
    """
    refuse_link(folder)
    if not is_marked(folder, KIND) and not is_empty(folder):
        if (found := foreign(folder, _ENTRIES)) is not None:
            raise ConfigError(f"{folder} holds {found}, which no demo has written there; name another --folder")
        if not (folder / "scenes" / "scenes.json").is_file():  # earlier versions wrote this file, but no marker file
            raise ConfigError(
                f"{folder} is not the folder of a demo: it is not empty and has no scenes/scenes.json; name another "
                "--folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    mark(folder, KIND)
    run = folder / RUN
    refuse_link(run)
    if is_empty(run):
        return
    if (found := foreign(run, _RUN)) is not None:
        raise ConfigError(
            f"{run} holds {found}, which no run has written there; move it elsewhere, or name another --folder"
        )
    with RunLock(run) as lock:
        lock.take()
        clear(run, RUN_ENTRIES)


def remove_demo(folder: Path) -> str:
    """Removes the files that the demo wrote in its folder, and no others. Returns a sentence about the result.

    Raises: RunLocked if a demo is training in the folder.
    """
    if is_empty(folder):
        return f"{folder}: nothing to remove"
    if folder.is_symlink():
        return f"{folder} stays: it is a link"
    if not is_marked(folder, KIND):
        return f"{folder} stays: it does not have the demo's marker file ({MARK})"
    run = folder / RUN
    if run.is_dir():
        RunLock(run).refuse()
    entries = {name: inner for name, inner in _ENTRIES.items() if name != re.escape(PAGE) or _is_ours(folder / PAGE)}
    if remove(folder, entries):
        return f"{folder}: removed"
    mark(folder, KIND)  # `remove` has removed the marker file, which the next `make clean` needs
    return f"{folder} stays: it holds {foreign(folder, entries)}, which the demo did not write"


def _is_ours(page: Path) -> bool:
    """Whether there is no page, or the program wrote it. Others may have files of this common name."""
    try:
        return not page.is_file() or is_page(page)
    except OSError:
        return False


def main(folder: str) -> None:
    """Removes the demo in `folder` and prints the result, for `make clean`."""
    try:
        print(remove_demo(Path(folder)))
    except UserError as error:
        sys.exit(f"error: {error}")
