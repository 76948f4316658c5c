"""`train --dry-run`: everything is checked and reported, and nothing is written."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.cli.main import main
from univitar_ds.config.deepspeed import deepspeed_path
from univitar_ds.config.load import dump_config
from univitar_ds.planning import report
from univitar_ds.run_lock import RunLock


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["token_histogram"] = {"image": {"16-31": 20}, "video": {"0": 1, "4-7": 9}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run_file(shards, tmp_path) -> Path:
    dump_config(run_config(shards, output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    return tmp_path / "run.yaml"


def printed(capsys, *arguments) -> str:
    assert main(["train", "--dry-run", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_is_described_and_nothing_is_written(capsys, run_file, tmp_path):
    before = files_below(tmp_path)
    text = printed(capsys, "--config", run_file, "--nproc", 2, "stages.0.samples=1000")
    for said in (
        f"tried: a new run in {tmp_path / 'runs' / 'tried'}",
        "2 processes, ZeRO-3, fp32",
        "16 images, 8 videos",
        "4 images, 2 videos",
        "4-36 (about 22) an item = 5-50 (about 9) pairs a pack, x 4 lanes = 20-200 (about 36) pairs a step",
        "4 lanes = 2 processes x 2 packs (accumulated by GradCache",
        "both: 1,000 samples, about 18 steps, up to 72 packs and 14,400 tokens",
        "images: native, 4-36 tokens an item",
        "up to 4 frames, 50 % of the steps",
        "trains patch_embedding, blocks, text, rest",
        "ZeRO-3: weights, gradients and optimizer states are sharded over 2 ranks",
        "between steps; a step adds activations",
        "both: ",
        "at its peak ('",
        "checkpoint_every 0: ",
        "encoder activations",
        "after its imports",
        "2 kept, so up to ",
        "encoder: randomly initialized",
        "a tokenizer of at most 300 tokens is trained on the captions",
        "evaluation: ",
        "Nothing was written",
    ):
        assert said in text, said
    assert files_below(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_a_run_that_another_process_has_locked_is_refused(capsys, run_file, tmp_path):
    run = tmp_path / "runs" / "tried"
    run.mkdir(parents=True)
    with RunLock(run) as lock:
        lock.take()
        assert main(["train", "--dry-run", "--config", str(run_file)]) == 2
    assert "in use" in capsys.readouterr().err


def test_a_run_of_more_ranks_than_this_machine_can_start_is_planned(capsys, run_file):
    assert "64 lanes = 64 processes x 1 pack" in printed(capsys, "--config", run_file, "--nproc", 64, "data.lanes=64")


def test_keys_that_are_set_and_not_used_are_listed(capsys, run_file):
    text = printed(capsys, "--config", run_file, "data.s3.region=x")
    assert "set but not used\n  data.s3.region: no source is at s3://" in text


def test_tars_without_a_manifest_give_a_range_of_steps(capsys, run_file, shards):
    tars = sorted(str(path) for path in shards.glob("*.tar") if "train" in path.name)
    sources = "[" + ", ".join(f"{{path: {tar}}}" for tar in tars) + "]"
    text = printed(capsys, "--config", run_file, f"data.sources={sources}", "stages.0.samples=1000")
    assert "samples not counted (no manifest)" in text
    assert "7-63 steps (item sizes are unknown: not in the manifests)" in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources.0.path=nowhere", "source nowhere: there is no such file or folder"),
        ("stages.0.lr=-1", "stages.0.lr=-1: stages.0.lr must be above 0, got -1"),
        ("objective.teacher.path=nowhere/at-all/x", "objective.teacher.path nowhere/at-all/x"),
        ("model.text.tokenizer=nowhere.json", "nowhere.json"),
        ("model.init_from=nowhere/at-all/x", "nowhere/at-all/x"),
        ("model.pool_heads=7", "model.pool_heads 7 does not divide"),
        ("deepspeed=zero9", "no file 'zero9'"),
        ("output=/proc/x", "/proc"),
    ],
)
def test_an_error_is_one_message_with_exit_status_2(capsys, run_file, tmp_path, monkeypatch, override, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["train", "--dry-run", "--config", str(run_file), override]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("histogram", [3, {"image": {"x": 1}}, {"image": {"1-2": "many"}}, {"image": {}}, None])
def test_an_invalid_or_empty_histogram_is_ignored(capsys, shards, tmp_path, histogram):
    folder = shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"token_histogram": histogram}))
    dump_config(run_config(folder, output=str(tmp_path / "runs")), tmp_path / "run.yaml")
    text = printed(capsys, "--config", tmp_path / "run.yaml", "stages.0.samples=1000")
    assert "7-63 steps (item sizes are unknown: not in the manifests)" in text


def test_a_full_disk_is_found_before_the_first_checkpoint(capsys, run_file, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: usage(10, 9, 1_000_000))
    assert main(["train", "--dry-run", "--config", str(run_file)]) == 2
    assert "3 checkpoints need 1" in (message := capsys.readouterr().err)
    assert "and 1 MB are free in" in message


def test_a_resumed_run_is_described_from_its_checkpoint(capsys, shards, tmp_path):
    run = tmp_path / "old"
    write_run(run, run_config(shards))
    shutil.copy(deepspeed_path("zero3_cpu"), run / "deepspeed.json")
    before = files_below(run)
    text = printed(capsys, "--resume", run, "logging.every_steps=3")
    assert "continues at step " in text
    assert f"the last checkpoint in {run}" in text
    extended = printed(capsys, "--resume", run, "--extend", "samples=50", "lr=1e-5")
    assert "both-2: 50 samples" in extended
    assert main(["train", "--dry-run", "--resume", str(run), "seed=9"]) == 2
    assert "seed would change the result" in capsys.readouterr().err
    assert files_below(run) == before


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    assert main(["train", "--dry-run", "--resume", str(tmp_path)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err


def test_memory_per_rank_depends_on_the_size_of_its_sharding_group(capsys, run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    (tmp_path / "two.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "sharding_ranks": 2}))
    text = printed(capsys, "--config", run_file, "--nproc", 4, f"deepspeed={tmp_path / 'two.json'}")
    assert "sharded over 2 ranks, in 2 groups" in text
    whole = printed(capsys, "--config", run_file, "--nproc", 2)
    line = next(line for line in whole.splitlines() if line.lstrip().startswith("optimizer"))
    assert line in text.splitlines()
