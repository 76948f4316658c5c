"""`univitar-ds plan`: output, plot and exit status."""

import json

import pytest
from PIL import Image

from univitar_ds.cli.main import main

RUN = ["plan", "--config", "univitar_0p3b", "--nodes", "2", "--formulas"]


def test_it_prints_one_json_object_and_draws_a_plot(capsys, tmp_path):
    image_file = tmp_path / "plan.png"
    assert main([*RUN, "--gpu", "H200", "--json", "--png", str(image_file), "seed=3"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["fits"]
    assert found["cluster"]["gpus"] == 16
    assert "image in" in printed.err
    with Image.open(image_file) as image:
        assert image.width > 1000
    assert main([*RUN, "--gpu", "H200", "--png", str(image_file)]) == 0, "an image that it wrote itself is replaced"
    assert "assumptions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "v100"], "--gpu v100 is not known"),
        (["--stage", "native"], "--stage native belongs to --sweep"),
        (["--sweep", "--stage", "none"], "--stage none is no stage of this run"),
        (["--png", "plan.jpg"], "plan.jpg does not end in .png"),
        (["--tokens-per-item", "7"], "--tokens-per-item 7 is outside of 576 to 5832"),
        (["deepspeed=nowhere"], "no file 'nowhere'"),
    ],
)
def test_invalid_input_is_an_error_with_a_remedy(capsys, words, said):
    assert main([*RUN, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_stage_is_an_error_before_the_plan(monkeypatch, capsys):
    monkeypatch.setattr("univitar_ds.planning.forecast.plan.plan_run", lambda *_: pytest.fail("the run was planned"))
    assert main([*RUN, "--sweep", "--stage", "none"]) == 2
    assert "its stages are" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_is_printed_and_fails(capsys):
    assert main([*RUN, "model.checkpoint_every=0", "stages.1.token_budget=200000"]) == 2
    printed = capsys.readouterr()
    assert "TOO MUCH" in printed.out
    assert "error: stage native needs" in printed.err
    assert "token_budget 200,000" in printed.err


def test_a_file_that_plan_did_not_write_is_not_overwritten(capsys, tmp_path):
    theirs = tmp_path / "plan.png"
    theirs.write_text("mine")
    assert main([*RUN, "--png", str(theirs)]) == 2
    assert theirs.read_text() == "mine"
    assert "plan.png" in capsys.readouterr().err
