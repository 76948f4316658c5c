"""The probabilities of `classify` are those of `zero_shot`; bad files are rows of their own."""

import json

import pytest
from PIL import Image

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.golden import CASES, golden
from tests.unit.inference.folders import BAD, IMAGES, VIDEOS
from univitar_ds import UniViTARModel
from univitar_ds.cli.main import main

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


def test_bad_files_are_rows_and_the_status_is_1(run, folder, tmp_path, capsys):
    missing = str(tmp_path / "nowhere.jpg")
    assert classify(run, folder, missing, "--labels", " red image, video", "--top", "1") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == IMAGES + VIDEOS + len(BAD) + 1
    rows = {line[: len(str(folder)) + 20].split()[0]: line for line in lines}
    assert "unreadable: the bytes are not an image" in rows[str(folder / "words.jpg")]
    assert "no such file" in next(line for line in lines if line.startswith(missing)).lower()
    good = rows[str(folder / "i00.png")]
    assert "% red image" in good or "% video" in good
    assert good.count("%") == 1


@pytest.mark.parametrize(
    ("labels", "said"), [("", "different names"), ("a,a", "different names"), ("a,,b", "different")]
)
def test_labels_must_differ(run, folder, capsys, labels, said):
    assert classify(run, folder, "--labels", labels) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"a photo", "needs {}"), (b"\xff", "UTF-8")])
def test_templates_that_cannot_be_used_are_refused(run, folder, tmp_path, capsys, content, said):
    (tmp_path / "templates.txt").write_bytes(content)
    assert classify(run, folder, "--labels", "a", "--templates", tmp_path / "templates.txt") == 2
    assert said in capsys.readouterr().err


def test_an_encoder_alone_is_refused(folder, capsys):
    assert classify(golden(CASES[0]).folder, folder, "--labels", "a,b") == 2
    assert "encoder alone" in capsys.readouterr().err
