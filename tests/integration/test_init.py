"""A run file that `univitar-ds init` prints can be trained without changes, on each format of source."""

import json
import os
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.unit.drafting import made
from univitar_ds.cli.main import main
from univitar_ds.config.load import load_config

SHORT = ("stages.0.samples=24", "stages.0.warmup_samples=4", "data.workers=0", "logging.tensorboard=false")


@pytest.mark.slow
@pytest.mark.parametrize("form", made.SOURCES)
def test_a_drafted_run_trains(form, tmp_path):
    made.SOURCES[form](tmp_path / "here", 36)
    source = {"table": "here/t.csv", "coco": "here/annotations/captions_val2017.json"}.get(form, "here")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "univitar_ds"]
    drafted = run_watched([*program, "init", source], check=True, cwd=tmp_path, env=environment)
    (tmp_path / "run.yaml").write_text(drafted.stdout)
    command = [*program, "train", "--config", "run.yaml", "--nproc", "1", *SHORT]
    run_watched(command, check=True, cwd=tmp_path, env=environment)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name != "packed-sources")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["samples"] >= 24
    config = load_config(run / "config.yaml")
    assert (config.evaluation.sources[0].split, load_config(tmp_path / "run.yaml").data.sources[0].hold_out) == (
        ("val", None) if form == "classes" else ("test", None if form == "table" else 0.2)
    )
    assert json.loads((run / "evaluation.json").read_text())["figures"]


def test_the_plan_of_a_drafted_run_on_shards_is_printed(tmp_path, monkeypatch, capsys):
    made.tars(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "here", "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", "run.yaml", "--dry-run"]) == 0
    assert "1 process, ZeRO-3" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
