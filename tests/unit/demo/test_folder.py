"""The demo's folder: any folder may be named, and only files that the demo wrote are replaced or removed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.finished import run_config
from tests.support.paths import ROOT
from univitar_ds.config.load import dump_config
from univitar_ds.demo.end_to_end import run_demo
from univitar_ds.demo.folder import claim, remove_demo
from univitar_ds.errors import ConfigError
from univitar_ds.owned import MARK, mark
from univitar_ds.reporting.page_file import GENERATOR
from univitar_ds.run_lock import RunLock, RunLocked

WRITTEN = [
    "scenes/scenes.json", "scenes/metadata.jsonl", "scenes/images/train-000000.png", "scenes/videos/test-000001.mp4",
    "shards/manifest.json", "shards/.pack.jsonl", "shards/.pack.lock", "shards/train-image-000000.tar",
    "shards/.train-image-000001.tar.partial", "shards/.pack.jsonl.partial", "runs/demo/metrics.jsonl",
    "runs/demo/checkpoints/step-00000050/rank00001.safetensors", "runs/demo/checkpoints/latest",
    "runs/demo/export/model.safetensors", "runs/demo/examples-image.png", "runs/demo/tb/events.out.tfevents.1.x",
    "report.html",
]  # fmt: skip
MINE = ["notes.txt", "scenes/images/holiday.png", "shards/photos-000000.tar", "runs/mine/config.yaml",
        "runs/demo/notes.txt", "runs/demo/checkpoints/step-00000050/notes.txt"]  # fmt: skip


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def demo(tmp_path) -> Path:
    """A folder in which the demo has run."""
    folder = tmp_path / "demo"
    claim(folder)
    fill(folder, *WRITTEN)
    (folder / "report.html").write_text(GENERATOR)
    mark(folder / "runs" / "demo", "run")
    dump_config(run_config(name="demo"), folder / "runs" / "demo" / "config.yaml")
    return folder


def test_a_second_demo_restarts_its_run_and_keeps_scenes_and_shards(demo):
    claim(demo)
    left = {name for name in files(demo) if ".lock-" not in name}
    assert left == {MARK, *(name for name in WRITTEN if not name.startswith("runs/"))}


@pytest.mark.parametrize("name", ["notes.txt", "runs/demo/photo.jpg", "scenes/holiday.png", "data/a.tar"])
def test_a_foreign_folder_is_refused_and_kept(tmp_path, name):
    fill(tmp_path, "runs/demo/checkpoints/latest", "scenes/scenes.json", name)
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="which no demo has written there; name another --folder"):
        claim(tmp_path)
    assert files(tmp_path) == before


def test_a_run_of_the_user_is_not_started_over(tmp_path):
    """Called `demo`, in a folder called `runs`, without the demo around it."""
    fill(tmp_path, *(name for name in WRITTEN if name.startswith("runs/")))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match="name another --folder"):
        claim(tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", MINE[-2:])
def test_a_note_in_the_demo_s_run_is_kept(demo, name):
    fill(demo, name)
    before = files(demo)
    with pytest.raises(ConfigError, match="which no run has written there"):
        claim(demo)
    assert files(demo) == before


def test_a_page_that_the_demo_did_not_write_is_neither_replaced_nor_removed(demo):
    (demo / "report.html").write_text("<html>mine</html>")
    before = files(demo)
    with pytest.raises(ConfigError, match=r"report\.html is a file that this command has not written"):
        run_demo(demo, 1, None)
    assert files(demo) == before
    assert remove_demo(demo) == f"{demo} stays: it holds report.html, which the demo did not write"
    assert files(demo) == {MARK, "report.html"}


@pytest.mark.parametrize("place", [".", "runs/demo"])
def test_nothing_is_replaced_through_a_link(demo, place):
    real = demo.parent / "real"
    (demo / place).rename(real)
    (demo / place).symlink_to(real)
    before = files(real)
    with pytest.raises(ConfigError, match="nothing is replaced through a link"):
        claim(demo)
    remove_demo(demo)
    assert files(real) == before


def test_a_demo_that_is_training_is_not_disturbed(demo):
    before = files(demo)
    with RunLock(demo / "runs" / "demo") as lock:
        lock.take()
        with pytest.raises(RunLocked):
            claim(demo)
        with pytest.raises(RunLocked):
            remove_demo(demo)
        assert before <= files(demo)


def test_the_demo_of_an_earlier_version_has_no_mark_and_is_used_again(demo):
    (demo / MARK).unlink()
    claim(demo)
    assert (demo / MARK).is_file()


def make_clean(folder: Path) -> str:
    """`make clean` in a copy of what it needs of the project."""
    shutil.copy(ROOT / "Makefile", folder)
    if not (folder / "univitar_ds").exists():
        (folder / "univitar_ds").symlink_to(ROOT / "univitar_ds")
    ended = subprocess.run(
        ["make", "clean", f"PYTHON={sys.executable}"],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


def test_make_clean_removes_what_was_made_here(demo):
    fill(demo.parent, ".venv/bin/python", ".venv/.univitar-ds")
    make_clean(demo.parent)
    assert not demo.exists()
    assert not (demo.parent / ".venv").exists()
    make_clean(demo.parent)


def test_make_clean_keeps_what_it_did_not_make(demo):
    fill(demo, *MINE)
    fill(demo.parent, ".venv/bin/python")
    said = make_clean(demo.parent)
    assert files(demo) == {MARK, *MINE}
    assert files(demo.parent / ".venv") == {"bin/python"}
    assert ".venv stays: it was not made by make" in said
    assert "demo stays: it holds notes.txt, which the demo did not write" in said
    make_clean(demo.parent)
    assert files(demo) == {MARK, *MINE}


def test_make_clean_keeps_a_folder_that_is_only_called_demo(tmp_path):
    fill(tmp_path, "demo/scenes/scenes.json", "demo/runs/demo/config.yaml")
    assert "demo stays: it does not have the demo's marker file" in make_clean(tmp_path)
    assert files(tmp_path / "demo") == {"scenes/scenes.json", "runs/demo/config.yaml"}


def test_make_installs_nothing_into_an_environment_that_it_did_not_make(tmp_path):
    fill(tmp_path, ".venv/bin/python", "requirements.txt", "pyproject.toml")
    shutil.copy(ROOT / "Makefile", tmp_path)
    ended = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "error: .venv is there and was not made by make; move it, or name another folder" in ended.stdout
    assert files(tmp_path / ".venv") == {"bin/python"}
