"""The memory that `univitar-ds plan` foresees is that of the real step of a recipe on a pretended GPU."""

import json

import pytest

from tests.support.pretence.environment import run_pretended

pytestmark = pytest.mark.slow
SETTINGS = [
    {"recipe": "univitar_0p3b", "zero": 2, "ranks": 8, "recompute": 0, "tokens": 8192},
    {"recipe": "univitar_0p3b", "zero": 3, "ranks": 256, "recompute": 1, "tokens": 32768},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"ZeRO {setting['zero']} of {setting['ranks']}")
def test_memory_of_a_step_is_foreseen_within_5_percent(environment, setting):
    done = run_pretended("tests.support.pretence.recipe", json.dumps(setting))
    assert done.returncode == 0, done.stderr[-6000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert abs(row["foreseen_gib"] / row["peak_gib"] - 1) < 0.05, row
