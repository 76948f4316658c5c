"""A run file that `univitar-ds init` prints can be trained without changes, on each format of source."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.unit.drafting import made
from univitar_ds.cli.main import main
from univitar_ds.config.load import load_config
from univitar_ds.data.importing import recognise
from univitar_ds.data.tools import survey

VIDEOS = "stages.0.video_ratio=0.5 stages.0.video.min_tokens=64 stages.0.video.max_tokens=64 stages.0.video_frames=2"
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


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def patient(monkeypatch):
    """Headers are read to the end, on a busy machine too."""
    monkeypatch.setattr(survey, "MEDIA_S", 3600.0)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("form", made.SOURCES)
def test_the_plan_of_a_drafted_run_is_printed_and_nothing_is_written(form, tmp_path, monkeypatch, capsys):
    """Also if the run would pack its source first."""
    made.SOURCES[form](tmp_path / "here", 36)
    source = {"table": "here/t.csv", "coco": "here/annotations/captions_val2017.json"}.get(form, "here")
    monkeypatch.chdir(tmp_path)
    assert main(["init", source, "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    before = files_below(tmp_path)
    assert main(["train", "--config", "run.yaml", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "1 process, ZeRO-3" in plan
    assert "evaluation: none" not in plan
    assert files_below(tmp_path) == before
    if form != "tars":
        assert re.search(rf"{re.escape(source)}: .*, about 2\d images; the run packs them when it starts, into", plan)
        assert re.search(r"native: [\d,]+ samples, about \d+ steps", plan), "the sizes of the items are known"
    if form == "classes":
        assert "(3 classes)" in plan


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(("form", "broken"), [("folder", "0.jpg"), ("classes", "train/green/1.jpg")])
def test_a_plan_lists_a_source_that_is_not_packed_once(form, broken, tmp_path, monkeypatch, capsys, caplog):
    """Training and evaluation read parts of it. What is wrong with its files is reported once."""
    (made.SOURCES[form](tmp_path / "here", 36) / broken).write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "here", "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    caplog.clear()
    listed = []
    monkeypatch.setattr(recognise, "check_split", listed.append)  # each listing begins with it
    assert main(["train", "--config", "run.yaml", "--dry-run"]) == 0
    assert len(listed) == 1
    assert "evaluation: here: " in capsys.readouterr().out
    (warning,) = [line for line in caplog.messages if "cannot be read" in line]
    assert f"the first: {broken.rpartition('/')[2]}: " in warning


@pytest.mark.parametrize(
    ("form", "override", "message"),
    [
        ("classes", "data.sources.0.split=other", "data.sources.0: source here: has no split 'other'; it has train"),
        ("classes", "objective.kind=softmax", "a contrastive run needs captions, and none was found in"),
        ("folder", "objective.kind=classification", "classification needs labels, and none was found in"),
        ("folder", VIDEOS, "stage native needs video samples, but the sources (here) hold only"),
        ("classes", "data.sources.0.table.image_key=x", "data.sources.0.table.image_key"),
    ],
)
def test_the_plan_of_a_source_that_is_not_packed_has_its_faults(form, override, message, tmp_path, monkeypatch, capsys):
    made.SOURCES[form](tmp_path / "here", 36)
    monkeypatch.chdir(tmp_path)
    assert main(["init", "here", "--gpus", "0"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", "run.yaml", "--dry-run", *override.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
