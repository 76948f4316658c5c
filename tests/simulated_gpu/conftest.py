"""Fixtures of tests on a simulated GPU, whose environment is made once."""

import json
import time
from typing import Any

import pytest

from tests.support.simulated_gpu.environment import NoSimulation, prepare, run_simulated


@pytest.fixture(scope="session")
def environment() -> None:
    """Makes the environment of the simulated GPU. Skips the test, with the reason, if that is not possible here."""
    try:
        seconds = prepare()
    except NoSimulation as reason:
        pytest.skip(f"no simulated GPU: {reason}")
    print(f"environment of the simulated GPU: {seconds:.0f} s")


@pytest.fixture(scope="session")
def trained(environment):
    """Returns a function that trains a list of cases in one process, and returns the result of `step.trained` for
    each."""

    def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
        begin = time.monotonic()
        done = run_simulated("tests.support.simulated_gpu.step", json.dumps(cases))
        assert done.returncode == 0, done.stderr[-6000:]
        print(f"{len(cases)} runs on a simulated GPU: {time.monotonic() - begin:.0f} s")
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
