"""The plugins in examples/plugins/ do what their texts state."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from tests.support.paths import ROOT
from univitar_ds.data.importing.recognise import read_source
from univitar_ds.data.importing.rows import ReadOptions
from univitar_ds.objectives.pairs import check_additive, pair_losses
from univitar_ds.plugins import RunInfo, StepInfo, load_plugins, optimizer_of
from univitar_ds.training.optimizers.elementwise import check_elementwise, new_moment

FOLDER = ROOT / "examples" / "plugins"
STEP = StepInfo(1, "s", "image", 8, 640, 8, 2.5, {"contrastive": 2.5}, 1.0, 1e-3, 10.0, -10.0, 0.5)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    load_plugins(())


def test_losses_are_written_and_kept_when_the_run_is_resumed(tmp_path, capsys):
    (plugin,) = load_plugins([str(FOLDER / "log_to_csv.py")])
    (callback,) = plugin.callbacks
    callback.on_start(RunInfo("a", tmp_path / "a", 0, 1, {}))
    callback.on_step(STEP)
    callback.on_start(RunInfo("a", tmp_path / "a", 1, 1, {}))
    callback.on_step(dataclasses.replace(STEP, step=2, samples=16, loss=2.25))
    assert (tmp_path / "a-losses.csv").read_text().splitlines() == ["step,samples,loss", "1,8,2.5", "2,16,2.25"]
    callback.on_checkpoint(tmp_path / "step-00000002")
    callback.on_end(json.loads('{"steps": 2, "seconds": {"training": 3.5}}'))
    assert capsys.readouterr().out == "checkpoint step-00000002 is complete\n2 steps in 3.5 s\n"


def test_a_list_has_a_path_and_a_caption_a_line(tmp_path):
    load_plugins([str(FOLDER / "read_list.py")])
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "pets.lst").write_text("# pets\na.png\ta cat\n\nb.png\ta dog\nc.png\tnone\n", encoding="utf-8")
    listing = read_source(tmp_path / "pets.lst", ReadOptions())
    assert [(row.file, row.captions, row.split) for row in listing.rows] == [
        ("a.png", ("a cat",), "train"),
        ("b.png", ("a dog",), "train"),
    ]
    assert len(listing.left_out) == 1


def test_the_hinge_loss_is_a_sum_over_pairs_and_pulls_pairs_together():
    (plugin,) = load_plugins([str(FOLDER / "hinge_loss.py")])
    loss = pair_losses(plugin.objectives["hinge"].loss_of_chunk)
    check_additive(loss)
    images, texts = F.normalize(torch.tensor([[1.0, 0.0], [0.28, 0.96]]), dim=-1), torch.eye(2)
    found = loss(images, texts, torch.tensor(10.0), torch.tensor(0.0), torch.eye(2, dtype=torch.bool), 2)
    assert abs(found.loss.item() - 0.18) < 1e-6  # only image 1 and text 0, whose cosine of 0.28 is above 0.1
    assert torch.equal(found.texts, torch.stack([images[1] / 2, torch.zeros(2)]))


def test_lion_moves_each_weight_by_the_learning_rate_and_is_elementwise():
    load_plugins([str(FOLDER / "lion.py")])
    _, lion = optimizer_of("lion", {"beta2": 0.5})
    check_elementwise(lion)
    weights = torch.tensor([1.0, 1.0, 1.0])
    moments = {name: new_moment(moment, weights) for name, moment in lion.moments.items()}
    for step, gradient in enumerate(([8.0, -8.0, 0.0], [-1.0, 100.0, 0.0]), 1):
        lion.step(weights, torch.tensor(gradient), moments, lr=0.25, weight_decay=0.0, step=step)
    # The mean is 4 and -4 before the second step; 0.9 of it outweighs 0.1 of a gradient of -1, and not of 100.
    assert weights.tolist() == [0.5, 1.0, 1.0]
    assert moments["mean"].tolist() == [1.5, 48.0, 0.0]
