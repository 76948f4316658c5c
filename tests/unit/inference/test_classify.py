"""The probabilities of `classify` are those of `zero_shot` or of a trained head; bad files are rows of their own."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from tests.support.shards import image, write_tar
from tests.unit.inference.folders import BAD, IMAGES, VIDEOS
from univitar_ds import UniViTARModel
from univitar_ds.cli.main import main
from univitar_ds.errors import UserError
from univitar_ds.model.classification import class_logits
from univitar_ds.preprocessing import Preprocessor

LABELS = ["red image", "green image", "video"]


def classify(*arguments: str) -> int:
    return main(["classify", *map(str, arguments)])


@pytest.mark.numeric
def test_probabilities_are_those_of_zero_shot(run, folder, tmp_path, capsys):
    (tmp_path / "templates.txt").write_text("a {}\n\n  {} here \n", encoding="utf-8")
    images = [folder / f"i{index:02d}.png" for index in range(IMAGES)]
    given = ["--labels", ",".join(LABELS), "--templates", tmp_path / "templates.txt", "--top", "9", "--json"]
    assert classify(run, *images, *given) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["file"] for one in found] == list(map(str, images))
    model = UniViTARModel.from_pretrained(run)
    wanted = model.zero_shot([Image.open(path) for path in images], LABELS, ["a {}", "{} here"])
    probabilities = [{each["label"]: each["probability"] for each in one["classes"]} for one in found]
    got = [[each[label] for label in LABELS] for each in probabilities]
    terms = encoder_terms(model.encoder.config, 64) + 4 * model.encoder.config.hidden_size
    for row, right, one in zip(got, wanted, found, strict=True):
        assert_sums_close(row, right, terms, scale=10.0)  # the logits, which are up to 10, are rounded
        values = [each["probability"] for each in one["classes"]]
        assert values == sorted(values, reverse=True)


def test_bad_files_have_rows_and_the_exit_status_is_1(run, folder, tmp_path, capsys):
    pipe = str(tmp_path / "pipe.jpg")
    os.mkfifo(pipe)
    assert classify(run, folder, pipe, "--labels", " red image, video", "--top", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == IMAGES + VIDEOS + len(BAD) + 1
    rows = {line[: len(str(folder)) + 20].split()[0]: line for line in lines}
    assert "unreadable: the bytes are not an image" in rows[str(folder / "words.jpg")]
    (row,) = [line for line in lines if line.startswith(pipe)]
    assert "unreadable:" in row
    assert row.count(pipe) == 1
    good = rows[str(folder / "i00.png")]
    assert "% red image" in good or "% video" in good
    assert good.count("%") == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [("", "different names"), ("a,a", "different names"), ("a,,b", "different"), ("cat", "at least two .*'cat'")],
)
def test_labels_must_differ(run, folder, capsys, labels, said):
    assert classify(run, folder, "--labels", labels) == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"a photo", "needs {}"), (b"\xff", "UTF-8")])
def test_templates_that_cannot_be_used_are_refused(run, folder, tmp_path, capsys, content, said):
    (tmp_path / "templates.txt").write_bytes(content)
    assert classify(run, folder, "--labels", "a,b", "--templates", tmp_path / "templates.txt") == 2
    assert said in capsys.readouterr().err


def test_an_encoder_alone_is_refused(folder, capsys):
    assert classify(golden(CASES[0]).folder, folder, "--labels", "a,b") == 2
    assert "encoder alone" in capsys.readouterr().err


def test_a_file_that_does_not_exist_is_refused_before_the_model_is_opened(folder, capsys):
    assert classify("no-model", folder / "i00.png", folder / "nowhere.jpg", "--labels", "a,b") == 2
    assert "nowhere.jpg: there is no such file" in capsys.readouterr().err


def test_a_file_that_is_named_twice_is_a_row_once(run, folder, capsys):
    named = [folder / "i01.png", folder / "i00.png", folder / "i01.png", folder / "." / ".." / folder.name / "i00.png"]
    assert classify(run, *named, "--labels", "a,b") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, named[:2]))


SETS = {"cars": ["c0", "c1", "c2"], "pets": ["p0", "p1"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of two data sets: its folder, and its model."""
    base = tmp_path_factory.mktemp("trained")
    samples = [
        (f"{name}-{label}", {"png": image(28, 28), "json": json.dumps({"label": label, "set": name}).encode()})
        for name, labels in SETS.items()
        for label in labels
    ]
    write_tar(base / "shards" / "x.tar", samples)
    config = run_config(base / "shards", objective={"kind": "classification"})
    return base / "run", write_run(base / "run", config)


@pytest.mark.numeric
def test_a_trained_head_names_the_classes_of_each_data_set(trained, folder, capsys):
    run, model = trained
    images = [folder / f"i{index:02d}.png" for index in range(IMAGES)]
    assert classify(run, *images, "--top", "2", "--json") == 0
    found = [json.loads(line)["classes"] for line in capsys.readouterr().out.splitlines()]
    prepare = Preprocessor(UniViTARModel.from_pretrained(run).preprocessor.config)
    terms = encoder_terms(model.vision.config, 64) + 4 * model.vision.config.hidden_size
    for path, guesses in zip(images, found, strict=True):
        pixels, frames, grids = prepare.pixels([Image.open(path)])
        logits = class_logits(model, pixels, torch.tensor(frames), torch.tensor(grids))[0]
        assert [one["set"] for one in guesses] == ["cars", "cars", "pets", "pets"]
        for (name, labels), own in zip(SETS.items(), logits.split([3, 2]), strict=True):
            wanted, order = own.softmax(dim=0).topk(2)
            got = [one for one in guesses if one["set"] == name]
            assert [one["label"] for one in got] == [labels[index] for index in order]
            assert_sums_close(torch.tensor([one["probability"] for one in got]), wanted, terms, scale=10.0)


def test_the_python_api_gives_the_probabilities_of_the_command(trained, folder, capsys):
    path = folder / "i00.png"
    assert classify(trained[0], path, "--top", "3", "--json") == 0
    printed = {one["label"]: one["probability"] for one in json.loads(capsys.readouterr().out)["classes"]}
    model = UniViTARModel.from_pretrained(trained[0])
    for name, labels in SETS.items():
        found = model.classify([Image.open(path)], name)
        assert dict(zip(model.class_names(name), found[0].tolist(), strict=True)) == {
            one: printed[one] for one in labels
        }
    with pytest.raises(UserError, match=r"None; .* cars, pets"):
        model.classify([Image.open(path)])
    features = model.features([Image.open(path)])
    (tokens,) = features.tokens
    assert torch.equal(features.pooled, model.module.pool(tokens, [len(tokens)])), "not by the trained pooling"
    with pytest.raises(UserError, match="encode_text needs a model with a text tower, and this is a classifier"):
        model.encode_text(["a cat"])


def test_only_a_classifier_has_classes(run, folder):
    with pytest.raises(UserError, match=r"zero_shot\(items, class_names\)"):
        UniViTARModel.from_pretrained(run).classify([Image.open(folder / "i00.png")])


def test_a_row_has_the_best_class_of_each_data_set_and_damage_has_a_row(trained, folder, capsys):
    assert classify(trained[0], folder / "i00.png", folder / "words.jpg") == 1
    good, bad = capsys.readouterr().out.splitlines()
    assert re.search(r"i00\.png +\[cars\] +\d+\.\d% c[012]  \[pets\] +\d+\.\d% p[01]$", good)
    assert "unreadable: the bytes are not an image" in bad


@pytest.mark.parametrize("weights", [["--weights", "trained"], ["--dtype", "bfloat16"]])
def test_a_checkpoint_of_a_classifier_is_a_model_too(trained, folder, capsys, weights):
    assert classify(next((trained[0] / "checkpoints").glob("step-*")), folder / "i00.png", *weights) == 0
    assert "[pets]" in capsys.readouterr().out


def test_labels_are_for_a_text_tower_and_none_for_a_head(trained, run, folder, capsys):
    assert classify(trained[0], folder, "--labels", "a,b") == 2
    assert "5 classes (c0, c1, c2, p0, p1); leave --labels out" in capsys.readouterr().err
    assert classify(run, folder) == 2
    assert "--labels cat,dog" in capsys.readouterr().err
    (folder.parent / "t.txt").write_text("a {}")
    assert classify(trained[0], folder, "--templates", folder.parent / "t.txt") == 2
    assert "give both" in capsys.readouterr().err


def test_a_classifier_without_its_classes_is_refused(trained, folder, tmp_path, capsys):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "classes.json").unlink()
    assert classify(tmp_path / "run", folder / "i00.png") == 2
    assert "classes.json cannot be read" in capsys.readouterr().err
