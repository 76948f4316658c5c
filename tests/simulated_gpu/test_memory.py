"""The memory that `univitar-ds plan` predicts is that of a real step of a recipe on a simulated GPU."""

import json

import pytest

from tests.support.simulated_gpu.environment import run_simulated

pytestmark = pytest.mark.slow
SETTING = {"recipe": "univitar_0p3b", "zero": 2, "ranks": 8, "recompute": 0, "tokens": 8192}


def test_memory_of_a_step_is_predicted_within_5_percent(environment):
    """`test_plan.py` does the same with ZeRO-3."""
    done = run_simulated("tests.support.simulated_gpu.recipe", json.dumps(SETTING))
    assert done.returncode == 0, done.stderr[-6000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert abs(row["foreseen_gib"] / row["peak_gib"] - 1) < 0.05, row
