"""The evaluation of an engine's weights against that of a checkpoint. On several ranks: tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.finished import Untrained, run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.config.load import load_config
from univitar_ds.errors import DataError
from univitar_ds.evaluation.during_training import DuringTraining
from univitar_ds.evaluation.run import evaluate
from univitar_ds.training.checkpoint.offline import open_trained
from univitar_ds.training.distributed.process_group import World

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=1)


@pytest.fixture(scope="module", params=["softmax", "classification"])
def run(request, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tried"
    return folder, write_run(folder, run_config(shards, objective={"kind": request.param}))


def test_the_figures_are_those_of_the_checkpoint_with_the_same_weights(run):
    folder, model = run
    (found,) = DuringTraining(load_config(folder / "config.yaml"), folder, ALONE)(Untrained(model), lambda: False)
    wanted = evaluate(open_trained(folder))
    assert (found["weights"], found["notes"]) == ("trained", wanted["notes"])
    assert len(found["figures"]) == len(wanted["figures"]) > 3
    for one, other in zip(found["figures"], wanted["figures"], strict=True):
        assert {**one, "interval": list(one["interval"])} == {**other, "interval": list(other["interval"])}


def test_a_rank_that_is_asked_to_stop_leaves_it(run):
    folder, model = run
    config = load_config(folder / "config.yaml")
    asked = iter([False, False, True])
    assert DuringTraining(config, folder, ALONE)(Untrained(model), lambda: next(asked, True)) is None


def test_sources_without_items_are_an_error_message(run, tmp_path):
    folder, model = run
    write_demo_shards(tmp_path / "videos", images=0, videos=4, shards=1)
    config = load_config(folder / "config.yaml", [f"evaluation.sources.0.path={tmp_path / 'videos'}"])
    images = config.stages[0].model_copy(update={"video_ratio": 0.0})
    config = config.model_copy(update={"stages": [images]})
    with pytest.raises(DataError, match="measured nothing"):
        DuringTraining(config, folder, ALONE)(Untrained(model), lambda: False)
