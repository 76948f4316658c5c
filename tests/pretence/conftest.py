"""The environment of the pretended GPU, made once and used by all tests of this folder."""

import json
import time
from typing import Any

import pytest

from tests.support.pretence.environment import NoPretence, prepare, run_pretended


@pytest.fixture(scope="session")
def environment() -> None:
    """The reason of a skip is that for which there can be no pretended GPU here."""
    try:
        seconds = prepare()
    except NoPretence as reason:
        pytest.skip(f"no pretended GPU: {reason}")
    print(f"environment of the pretended GPU: {seconds:.0f} s")


@pytest.fixture(scope="session")
def trained(environment):
    """Trains the cases of a list of dicts in one process; returns what `step.trained` returns for each."""

    def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        begin = time.monotonic()
        done = run_pretended("tests.support.pretence.step", json.dumps(cases))
        assert done.returncode == 0, done.stderr[-6000:]
        print(f"{len(cases)} runs on a pretended GPU: {time.monotonic() - begin:.0f} s")
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
