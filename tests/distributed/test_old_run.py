"""A run folder that an earlier version wrote resumes with the bits of a run of this version that was never interrupted.

`tests/golden/old_run` holds all of it but the weights and moments, 41 MB, whose bits depend on the processor: the run
of this version gives them, under the names that the earlier version gave them.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import ROOT
from tests.support.progress import run_watched

pytestmark = pytest.mark.distributed

OLD = ROOT / "tests" / "golden" / "old_run"
STEP, LAST = "step-00000006", "step-00000009"
TRAIN = [sys.executable, "-m", "univitar_ds", "train"]


def copied(folder: Path) -> None:
    """The old shards and run below `folder`, whose place their files name."""
    shutil.copytree(OLD / "shards", folder / "shards")
    shutil.copytree(OLD / "run", folder / "old")
    for path in (folder / "old").rglob("*"):
        if path.suffix in (".json", ".yaml"):
            path.write_text(path.read_text(encoding="utf-8").replace("FOLDER", str(folder)), encoding="utf-8")


def fill(checkpoint: Path, weights: Path) -> None:
    """Gives an old checkpoint its weights, and its manifest the hashes of what the test has changed."""
    shutil.copy(weights, checkpoint / weights.name)
    files = {}
    for path in checkpoint.glob("*"):
        if path.name != "manifest.json":
            content = path.read_bytes()
            files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"version": 1, "files": files}), encoding="utf-8")


def trained(*arguments: str | Path) -> None:
    done = run_watched([*TRAIN, *map(str, arguments)])
    assert done.returncode == 0, done.stderr[-3000:]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_run_of_an_earlier_version_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copied(tmp_path)
    old, new = tmp_path / "old", tmp_path / "runs" / "small"
    trained("--config", old / "config.yaml")
    fill(old / "checkpoints" / STEP, new / "checkpoints" / STEP / "rank00000.safetensors")
    trained("--resume", old)
    assert lines(old / "samples-rank0.jsonl") == lines(new / "samples-rank0.jsonl")
    for ours, theirs in zip(lines(new / "metrics.jsonl")[6:], lines(old / "metrics.jsonl")[6:], strict=True):
        assert {name: ours[name] for name in ("step", "loss", "lr", "grad_norm")} == {
            name: theirs[name] for name in ("step", "loss", "lr", "grad_norm")
        }
    ours, theirs = (load_file(run / "checkpoints" / LAST / "rank00000.safetensors") for run in (new, old))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
