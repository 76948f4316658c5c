"""`univitar-ds eval tokens`: sizes of native and square items, results, and the drawing."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support import datasets
from tests.support.media import encoded, noise
from univitar_ds import UniViTARModel
from univitar_ds.cli.main import main
from univitar_ds.tasks.sizes import MostTokens

CLASSES = ("cat", "dog")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pets"
    files = {
        f"{split}/{name}/{index}.png": encoded(noise(28, 84, seed=10 * place + index), "PNG")
        for split in ("train", "test")
        for place, name in enumerate(CLASSES)
        for index in range(3)
    }
    return datasets.write(folder, files)


def measured(capsys, *arguments: str | Path) -> dict:
    status = main(["eval", "tokens", *map(str, arguments), "--json"])
    found = capsys.readouterr()
    assert status == 0, found.err
    return json.loads(found.out)


@pytest.mark.parametrize("cell", [14, 28])
@pytest.mark.parametrize("frames", [1, 8])
@pytest.mark.parametrize("size", [(10, 10), (480, 640), (64, 1000), (4000, 3000), (1, 5000)])
def test_native_items_have_the_most_tokens_at_their_aspect_ratio(size, frames, cell):
    steps = -(-frames // 2)
    most = 256 * steps
    t, h, w = MostTokens(1, most, cell).grid(*size, frames)
    assert t == steps
    assert t * h * w <= most
    one = cell // 14
    assert (t * (h + one) * (w + one)) > most or min(h, w) == one  # one more row and column would be too many
    exact = (256 * size[0] / size[1]) ** 0.5
    assert abs(h - exact) <= one or min(h, w) == one


def test_a_copy_of_a_training_item_is_found_at_every_number_of_tokens(run, pets, tmp_path, capsys):
    given = ["--data", pets, "--cache", tmp_path, "--by", "knn", "--counts", "16,4", "--png", tmp_path / "a.png"]
    result = measured(capsys, run, *given)
    tasks = [figure["task"] for figure in result["figures"]]
    assert tasks == [f"kNN ({count} tokens, {view})" for count in (4, 16) for view in ("native", "square")]
    assert {(figure["n"], figure["chance"]) for figure in result["figures"]} == {(6, 0.5)}
    assert "with 12 and 16 tokens on average" in result["notes"][1]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "tokens", str(run), *map(str, given[:-1]), str(tmp_path / "a.png"), "--counts", "4"]) == 0


def test_zero_shot_of_squares_is_that_of_the_model_on_squares(run, pets, tmp_path, capsys):
    (tmp_path / "templates").write_text("a {}\n", encoding="utf-8")
    given = ["--data", pets, "--cache", tmp_path, "--templates", tmp_path / "templates", "--counts", "9"]
    figure = measured(capsys, run, *given)["figures"][1]
    assert figure["task"] == "zero-shot (9 tokens, square)"
    model = UniViTARModel.from_pretrained(run)
    paths = [pets / "test" / name / f"{index}.png" for name in CLASSES for index in range(3)]
    squares = [Image.open(path).resize((42, 42), Image.Resampling.BICUBIC) for path in paths]
    probabilities = model.zero_shot(squares, CLASSES, ["a {}"])
    right = [CLASSES[column] == path.parent.name for column, path in zip(probabilities.argmax(1), paths, strict=True)]
    assert figure["value"] == pytest.approx(sum(right) / len(right))


def test_numbers_that_the_encoder_cannot_take_and_files_of_others_are_refused(run, pets, tmp_path, capsys):
    given = ["eval", "tokens", str(run), "--data", str(pets), "--cache", str(tmp_path), "--by", "knn"]
    assert main([*given, "--counts", "1000000"]) == 2
    assert "an item has 1 to 65536 tokens" in capsys.readouterr().err
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert main([*given, "--png", str(tmp_path / "mine.png")]) == 2
    assert "not written" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


def test_an_encoder_alone_is_measured_by_knn(run, pets, tmp_path, capsys):
    encoder = tmp_path / "encoder"
    assert main(["convert", str(run), str(encoder), "--to", "release", "--part", "encoder"]) == 0
    capsys.readouterr()
    figures = measured(capsys, encoder, "--data", pets, "--cache", tmp_path, "--counts", "4")["figures"]
    assert figures[0]["task"].startswith("kNN")
    assert main(["eval", "tokens", str(encoder), "--data", str(pets), "--by", "zero-shot"]) == 2
    assert "no text tower" in capsys.readouterr().err
