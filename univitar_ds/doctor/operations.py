"""Checks the folder of DeepSpeed's compiled operations: whether it can be written, and locks of killed builds in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, Found, Row, listed
from univitar_ds.planning.checks import existing_parent
from univitar_ds.training.engine.compiled_ops import LockState, folders, lock_state

NAME = "operations"


def rows_of(candidates: list[Path]) -> list[Row]:
    """Returns rows about the first folder of `candidates` that a run can write to. Leaves no file there."""
    folder = next(filter(_writable, candidates), None)
    if folder is None:
        found = f"none of {listed(candidates)} can be written, so no operation can be compiled"
        return [Row(NAME, FAILED, found, "set TORCH_EXTENSIONS_DIR to a folder on this node that you may write to")]
    rows = [row for lock in sorted(folder.glob("*/lock")) if (row := _of_lock(lock)) is not None]
    if rows:
        return rows
    built = sorted(library.parent.name for library in folder.glob("*/*.so"))
    unfinished = sorted({path.parent.name for path in folder.glob("*/build.ninja")} - set(built))
    none = "no operation is compiled; of the shipped configurations only zero3_nvme needs one"
    text = f"compiled: {listed(built)}" if built else none
    if unfinished:
        text += f"; {listed(unfinished)} was not finished and is compiled again when it is needed"
    return [Row(NAME, OK, f"no build holds a lock in {folder}; {text}")]


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=existing_parent(folder)):  # without a name, so no file is left
            return True
    except OSError:
        return False


def _of_lock(lock: Path) -> Row | None:
    state, reason = lock_state(lock)
    if state is LockState.GONE:
        return None
    if state is LockState.STALE:
        return Row(
            NAME, FAILED, f"{lock} was left by a killed build, and torch would wait for it forever", f"rm {lock}"
        )
    return Row(NAME, FAILED, f"{lock} is held: {reason}", "wait for that build, or end it and start this check again")


def _check(context: Context) -> Found:
    return Found(rows_of(folders()))


CHECK = Check(NAME, _check, "the disk with the folder of compiled operations (TORCH_EXTENSIONS_DIR) does not answer")
