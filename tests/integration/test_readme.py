"""The Python snippets in README and docs/models.md run unchanged."""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from univitar_ds.convert.export import export_run

PAGES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/models.md")]
SNIPPETS = [snippet for page in PAGES for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
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


def test_the_pages_have_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_runs(folder, number):
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = run_watched([sys.executable, "-c", BEFORE + SNIPPETS[number]], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
