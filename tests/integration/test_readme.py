"""The snippets of README's section "Use the model" run as they are written."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.convert.export import export_run

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BEFORE = """
import numpy as np
from PIL import Image
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
frame = image.resize((56, 56))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the runs that README names."""
    place = tmp_path_factory.mktemp("readme")
    for run in ("runs/photos", "demo/runs/demo"):
        write_run(place / run, run_config())
        export_run(place / run, place / run / "export")
    return place


def test_the_section_has_its_snippets():
    section = README[README.index("## Use the model") : README.index("### Convert")]
    assert len(re.findall("```python", section)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(folder, number):
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = run_watched([sys.executable, "-c", BEFORE + SNIPPETS[number]], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
