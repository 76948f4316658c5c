"""A run folder of an earlier version resumes with the bits of an uninterrupted run of this version.

`tests/golden/old_run` has all of the folder except the weights and moments (41 MB), whose bits depend on the processor.
They are taken from a run of this version, under the names of the earlier version.
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
    """Copies the old shards and the old run to `folder`, and writes its path into their files."""
    shutil.copytree(OLD / "shards", folder / "shards")
    shutil.copytree(OLD / "run", folder / "old")
    for path in (folder / "old").rglob("*"):
        if path.suffix in (".json", ".yaml"):
            path.write_text(path.read_text(encoding="utf-8").replace("FOLDER", str(folder)), encoding="utf-8")


def fill(checkpoint: Path, weights: Path) -> None:
    """Adds weights to an old checkpoint, and the hashes of the changed files to its manifest."""
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
