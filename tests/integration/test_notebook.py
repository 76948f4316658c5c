"""`examples/quickstart.ipynb` runs from its first cell to its last, with fewer samples."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched

CELLS = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SMALL = {"SAMPLES = 4000": "SAMPLES = 40", '"--images", 1600': '"--images", 60', '"--videos", 400': '"--videos", 12'}


def test_every_cell_is_python_and_has_the_numbers_that_the_test_reduces():
    text = "\n".join(CODE)
    compile(text, "quickstart.ipynb", "exec")
    assert all(text.count(number) == 1 for number in SMALL)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path):
    text = "\n".join(CODE)
    for number, small in SMALL.items():
        text = text.replace(number, small)
    script = tmp_path / "quickstart.py"
    script.write_text(text + "\nsheet.save('sheet.png')\n", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = run_watched([sys.executable, str(script)], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "chance" in done.stdout
    assert (tmp_path / "sheet.png").stat().st_size > 1000
