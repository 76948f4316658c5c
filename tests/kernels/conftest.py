"""Tests marked `kernels` run Triton's kernels: compiled if there is a GPU, else in Triton's interpreter.

Triton selects its interpreter when it is imported, once in a process. So the first of these tests starts a separate
process that runs all selected tests of this kind, and each outcome is reported here under the name of its test. With
pytest-xdist there is one such process for each file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support.progress import Stalled, run_watched

OUTCOMES = "UNIVITAR_DS_TEST_OUTCOMES"
STASH = pytest.StashKey[dict[str, tuple[str, str]]]()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if OUTCOMES in os.environ or torch.cuda.is_available() or not pyfuncitem.get_closest_marker("kernels"):
        return None
    session = pyfuncitem.session
    outcomes = session.stash.setdefault(STASH, {})
    if pyfuncitem.nodeid not in outcomes:
        marked = [item for item in session.items if item.get_closest_marker("kernels")]
        if "PYTEST_XDIST_WORKER" in os.environ:  # other workers run the other files
            marked = [item for item in marked if item.path == pyfuncitem.path]
        outcomes |= _run_interpreter(session.config.rootpath, [item.nodeid for item in marked])
    outcome, story = outcomes[pyfuncitem.nodeid]
    if outcome != "passed":
        pytest.fail(f"in Triton's interpreter ({outcome}):\n{story}", pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if OUTCOMES in os.environ and (report.when == "call" or report.failed):
        with open(os.environ[OUTCOMES], "a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome, report.longreprtext]) + "\n")


def _run_interpreter(root: Path, asked: list[str]) -> dict[str, tuple[str, str]]:
    """(outcome, failure) of each test; for a test that was not reached, the last output of the process."""
    handle, name = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    path = Path(name)
    environment = {**os.environ, "TRITON_INTERPRET": "1", OUTCOMES: str(path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *asked]
    try:
        done = run_watched(command, cwd=root, env=environment)
        output = done.stdout[-3000:] + done.stderr[-3000:]
    except Stalled as stalled:
        output = str(stalled)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.unlink()
    lost = dict.fromkeys(asked, ("lost", output))
    return lost | {nodeid: (outcome, story) for nodeid, outcome, story in rows}
