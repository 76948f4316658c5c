"""A finished run that `--extend` continues ends with the same weights, bit for bit, as a run that had both stages."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.finished import run_config
from tests.support.runs import train_rank
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.config.run_folder import CHECKPOINTS
from univitar_ds.errors import ConfigError
from univitar_ds.formats.checkpoint_dir import latest
from univitar_ds.formats.elastic import read_full
from univitar_ds.run import create_run, reopen_run

pytestmark = pytest.mark.distributed
EXTENSION = ["samples=12", "lr=5e-4", "video_ratio=0.0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("data") / "shards", images=24, videos=8, shards=1)


def settings(shards, output, name, stages):
    data = {"sources": [{"path": str(shards)}], "workers": 0, "lanes": 2}
    return run_config(shards, name=name, output=str(output), stages=stages, data=data, logging={"peak_tflops": 0.05})


def test_an_extended_run_has_the_weights_of_a_run_with_both_stages(shards, tmp_path):
    (first,) = run_config().model_dump(mode="json", exclude_unset=True)["stages"]
    second = {**first, "name": "both-2", "samples": 12, "lr": 5e-4, "video_ratio": 0.0}
    whole = create_run(settings(shards, tmp_path, "whole", [first, second]), "the test", 2)
    assert run_distributed(train_rank, 2, whole) == [True, True]
    run = create_run(settings(shards, tmp_path, "extended", [first]), "the test", 2)
    assert run_distributed(train_rank, 2, run) == [True, True]
    ended = latest(run / CHECKPOINTS).name
    reopen_run(run, (), 2, extension=EXTENSION)
    assert [stage.name for stage in load_config(run / "config.yaml").stages] == ["both", "both-2"]
    assert run_distributed(train_rank, 2, run) == [True, True]
    assert latest(run / CHECKPOINTS).name == latest(whole / CHECKPOINTS).name > ended
    one, other = (read_full(latest(folder / CHECKPOINTS)) for folder in (whole, run))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events] == ["both", "both-2"]


@pytest.mark.parametrize(("extension", "said"), [
    (["samples=0"], r"(?s)the stage that --extend adds to .*samples"),
    (["sampels=5"], "sampels"),
    (["name=both"], "names"),
])  # fmt: skip
def test_an_invalid_extension_does_not_change_the_run_file(shards, tmp_path, extension, said):
    (first,) = run_config().model_dump(mode="json", exclude_unset=True)["stages"]
    run = create_run(settings(shards, tmp_path, "run", [first]), "the test", 1)
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=said):
        reopen_run(run, (), 1, extension=extension)
    assert (run / "config.yaml").read_bytes() == before


def test_overrides_beside_an_extension_cannot_change_an_existing_stage(shards, tmp_path):
    (first,) = run_config().model_dump(mode="json", exclude_unset=True)["stages"]
    run = create_run(settings(shards, tmp_path, "run", [first]), "the test", 1)
    with pytest.raises(ConfigError, match=r"stages\.0\.lr would change the result"):
        reopen_run(run, ["stages.0.lr=1.0"], 1, extension=["samples=12"])
