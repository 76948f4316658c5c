"""The memory that `univitar-ds plan` predicts is that of a real step of a recipe on a simulated GPU."""

import json

import pytest

from tests.support.simulated_gpu.environment import run_simulated

pytestmark = pytest.mark.slow
SETTINGS = [
    {"recipe": "univitar_0p3b", "zero": 2, "ranks": 8, "recompute": 0, "tokens": 8192},
    {"recipe": "univitar_0p3b", "zero": 3, "ranks": 256, "recompute": 1, "tokens": 32768},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"ZeRO {setting['zero']} of {setting['ranks']}")
def test_memory_of_a_step_is_predicted_within_5_percent(environment, setting):
    done = run_simulated("tests.support.simulated_gpu.recipe", json.dumps(setting))
    assert done.returncode == 0, done.stderr[-6000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert abs(row["foreseen_gib"] / row["peak_gib"] - 1) < 0.05, row
