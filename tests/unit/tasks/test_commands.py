"""`univitar-ds eval TASK` on small data sets in common formats."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import datasets
from tests.support.media import encoded, noise, video
from tests.support.shards import write_demo_shards
from univitar_ds import UniViTARModel
from univitar_ds.cli.main import main
from univitar_ds.cli.tasks import TASKS
from univitar_ds.config.data import SourceConfig
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.errors import ConfigError
from univitar_ds.inference.embed_files import ModelOptions
from univitar_ds.tasks.cached.feature_cache import Request
from univitar_ds.tasks.models import open_model
from univitar_ds.tasks.sizes import at_most

CLASSES = ("cat", "dog", "horse")
EACH = 4
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with both splits. Images of whole patches as PNG, which no resizing changes."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    for split_number, split in enumerate(("train", "test")):
        for number, name in enumerate(CLASSES):
            for index in range(EACH):
                seed = 100 * split_number + 10 * number + index
                datasets.write(folder, {f"{split}/{name}/{index}.png": encoded(noise(28, 42, seed=seed), "PNG")})
    return folder


def measured(capsys, *arguments: str | Path) -> dict:
    assert main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def by_measure(result: dict) -> dict[str, dict]:
    return {figure["measure"]: figure for figure in result["figures"]}


def test_zero_shot_is_that_of_the_model_itself(run, pets, tmp_path, capsys):
    (tmp_path / "templates").write_text("\ufeff# words\na {c}\nthe {} here\n", encoding="utf-8")
    given = ["--data", pets, "--cache", tmp_path, "--templates", tmp_path / "templates"]
    result = measured(capsys, "zero-shot", run, *given)
    used = f"2 templates (of {tmp_path / 'templates'})"
    assert result["notes"] == [f"Zero-shot of images: each class name in {used}."]
    figure = by_measure(result)["top-1"]
    paths = [pets / "test" / name / f"{index}.png" for name in CLASSES for index in range(EACH)]
    model = UniViTARModel.from_pretrained(run)
    probabilities = model.zero_shot([Image.open(path) for path in paths], CLASSES, ["a {}", "the {} here"])
    right = [CLASSES[column] == path.parent.name for column, path in zip(probabilities.argmax(1), paths, strict=True)]
    assert figure["value"] == pytest.approx(sum(right) / len(right))
    assert (figure["n"], figure["candidates"], figure["chance"]) == (12, 3, pytest.approx(1 / 3))
    assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]


@pytest.mark.parametrize("task", ["knn", "linear", "linear --solver sgd", "attentive --epochs 100"])
def test_a_probe_finds_test_items_that_are_copies_of_training_items(run, pets, tmp_path, capsys, task):
    twins = tmp_path / "twins"
    shutil.copytree(pets / "train", twins / "train")
    shutil.copytree(pets / "train", twins / "test")
    task, *options = task.split()
    options = ["--neighbours", "1"] if task == "knn" else options
    figure = by_measure(measured(capsys, task, run, "--data", twins, "--cache", tmp_path, *options))["top-1"]
    assert figure["n"] == 3 * EACH
    assert figure["value"] == 1.0 if task == "knn" else figure["value"] > 0.6  # chance: 1/3


def test_a_probe_works_on_an_encoder_alone_and_zero_shot_names_what_is_missing(run, pets, tmp_path, capsys):
    encoder = tmp_path / "encoder"
    assert main(["convert", str(run), str(encoder), "--to", "release", "--part", "encoder"]) == 0
    capsys.readouterr()
    given = ["--data", str(pets), "--cache", str(tmp_path)]
    assert by_measure(measured(capsys, "knn", encoder, *given))["top-1"]["n"] == 12
    assert main(["eval", "zero-shot", str(encoder), *given]) == 2
    assert "no text tower" in capsys.readouterr().err


def test_retrieval_takes_each_line_as_a_caption(run, tmp_path, capsys):
    members = []
    for index in range(4):
        text = f"a cat of number {index}\na pet of number {index}\n"
        members += [(f"{index}.png", encoded(noise(28, 42, seed=index), "PNG")), (f"{index}.txt", text)]
    datasets.write_tar(tmp_path / "wds_pets" / "test" / "0.tar", members)  # CLIP_benchmark's layout
    given = ["--data", tmp_path / "wds_pets", "--cache", tmp_path, "--captions", "lines"]
    result = measured(capsys, "retrieval", run, *given)
    found = {(figure["task"], figure["measure"]): figure["candidates"] for figure in result["figures"]}
    assert found[("image to text", "R@5")] == 8
    assert found[("text to image", "R@1")] == 4


def test_a_folder_of_clip_benchmark_has_names_and_splits(run, tmp_path, capsys):
    folder = tmp_path / "wds_pets"
    for split in ("train", "test"):
        members = []
        for index in range(6):
            seed = index + 10 * (split == "test")
            members += [(f"{index}.png", encoded(noise(28, 42, seed=seed), "PNG")), (f"{index}.cls", str(index % 3))]
        datasets.write_tar(folder / split / "0.tar", members)
    datasets.write(folder, {"classnames.txt": "cat\ndog\nhorse\n"})
    assert by_measure(measured(capsys, "zero-shot", run, "--data", folder))["top-1"]["candidates"] == 3
    assert by_measure(measured(capsys, "knn", run, "--data", folder))["top-1"]["n"] == 6
    assert main(["eval", "knn", str(run), "--data", str(folder), "--split", "val"]) == 2
    assert "has no split of this name; it has test, train: give one of them" in capsys.readouterr().err


def test_a_probe_is_never_scored_on_what_it_learns_from(run, pets, tmp_path, capsys):
    given = ["--data", str(pets), "--cache", str(tmp_path), "--split", "train"]
    assert main(["eval", "knn", str(run), *given]) == 2
    assert "--train-split" in capsys.readouterr().err


def test_data_without_labels_or_captions_is_an_error(run, tmp_path, capsys):
    members = [(f"{index}.{end}", content) for index in range(3) for end, content in _captioned(index)]
    datasets.write_tar(tmp_path / "0.tar", members)
    assert main(["eval", "zero-shot", str(run), "--data", str(tmp_path / "0.tar")]) == 2
    assert "no item has a label" in capsys.readouterr().err


def test_a_modality_that_a_split_lacks_is_a_note_beside_the_other_ones_results(run, pets, tmp_path, capsys):
    members = [("clip.mp4", video([np.asarray(noise(28, 42, seed=seed)) for seed in range(4)])), ("clip.cls", "cat")]
    for number, name in enumerate(CLASSES):
        members += [(f"{number}.png", encoded(noise(28, 42, seed=number), "PNG")), (f"{number}.cls", name)]
    datasets.write_tar(tmp_path / "0.tar", members)
    given = ["--data", pets, "--train-data", tmp_path / "0.tar", "--cache", tmp_path]
    result = measured(capsys, "knn", run, *given)
    assert {figure["modality"] for figure in result["figures"]} == {"image"}
    assert "No video of the test split has a label" in result["notes"][0]
    assert re.match(r"knn: 3 images of \S+, split train, are the training items, and 12 images of \S+, split test, are "
                    "scored, by their pooled features; 3 classes", result["notes"][1])  # fmt: skip
    keys = [key for index in tmp_path.rglob("*.index.json") for key in json.loads(index.read_text())["key"]]
    assert len(keys) == len(CLASSES) * (EACH + 1)  # features of the video are not computed


def test_shards_of_a_modality_that_is_not_read_are_left_out(run, tmp_path):
    source = SourceConfig(path=str(write_demo_shards(tmp_path, images=4, videos=2, shards=1)))
    opened = open_model(str(run), ModelOptions())
    setup = opened.setup(texts=False)
    images = replace(setup, reading=replace(setup.reading, only="image"))
    found = [
        {place.modality for place in Request.of(opened, one, source, progress=False).places} for one in (setup, images)
    ]
    assert found == [{"image", "video"}, {"image"}]


def test_the_default_templates_are_named(run, tmp_path, capsys):
    members = [("clip.mp4", video([np.asarray(noise(28, 42, seed=seed)) for seed in range(4)])), ("clip.cls", "cat")]
    members += [("image.png", encoded(noise(28, 42, seed=1), "PNG")), ("image.cls", "dog")]
    datasets.write_tar(tmp_path / "0.tar", members)
    (tmp_path / "names").write_text("cat\ndog\n")
    given = ["--data", tmp_path / "0.tar", "--class-names", tmp_path / "names", "--cache", tmp_path / "cache"]
    image, of_video, sizes = measured(capsys, "zero-shot", run, *given)["notes"]
    others = "; the run's own evaluation has others (evaluation.{}_templates); --templates FILE takes others."
    assert (
        image == f"Zero-shot of images: each class name in 80 templates (CLIP's, for ImageNet){others.format('image')}"
    )
    assert of_video == f"Zero-shot of videos: each class name in 'a video of a {{}}.'{others.format('video')}"
    assert sizes.startswith("Videos are read by the model's size rule, that of images;")


def _captioned(index: int) -> list[tuple[str, bytes | str]]:
    return [("png", encoded(noise(28, 42, seed=index), "PNG")), ("txt", "the same caption")]


def test_a_table_has_the_interval_and_the_chance_beside_each_result(run, pets, tmp_path, capsys):
    assert main(["eval", "knn", str(run), "--data", str(pets), "--cache", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"knn of {run} on {pets}"
    assert [cell.strip() for cell in lines[2].strip("|").split("|")][2:5] == ["result", "95 %", "chance"]


def test_a_run_of_the_name_of_a_task_is_a_path(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    shutil.copytree(run, run.parent / "knn")
    assert main(["eval", "./knn"]) == 2  # the run has no evaluation data
    assert "nowhere" in capsys.readouterr().err


def test_an_item_of_the_attentive_probe_has_at_most_the_tokens_that_are_asked_for(run, pets, tmp_path, capsys):
    given = ["attentive", run, "--data", pets, "--cache", tmp_path, "--epochs", "1"]
    assert by_measure(measured(capsys, *given, "--max-tokens", "4"))["top-1"]["n"] == 12
    encoder = EncoderConfig(**SMALL)
    assert at_most(encoder, 8).grid(900, 600) == (1, 2, 2)
    with pytest.raises(ConfigError, match="multiples of 28 px; give at least 4"):
        at_most(encoder, 3)


def test_numbers_of_tokens_are_whole_numbers(capsys):
    for value, said in (("4,,9", "is no list of whole numbers"), ("x", "such as 64,256"), ("0", "below 1")):
        with pytest.raises(SystemExit):
            main(["eval", "tokens", "run", "--data", "data", f"--counts={value}"])
        assert said in capsys.readouterr().err


def test_a_value_of_label_maps_is_a_whole_number(run, capsys):
    for value in ("x", "-1", "65536"):
        with pytest.raises(SystemExit):
            main(["eval", "dense", str(run), "--data", "nowhere", f"--ignore={value}"])
        assert f"{value} is not a value of a label map; give values from 0 to 65535" in capsys.readouterr().err


def test_each_task_is_computed_by_processes_takes_peers_and_continues(capsys):
    for task in TASKS:
        with pytest.raises(SystemExit):
            main(["eval", task, "--help"])
        about = capsys.readouterr().out
        assert all(text in about for text in ("--nproc", "SigLIP", "interruption the same command continues")), task
        assert ("--max-gb" in about) == (task in ("attentive", "dense"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "zeroshot", "run", "--data", "x"], "eval has no task 'zeroshot'; did you mean 'zero-shot'?"),
        (["eval", "zero-shot", "run", "--data", "x", "--templats=y"], "--templats=y; did you mean --templates?"),
        (["report", "run", "--imagse"], "unrecognized arguments: --imagse; did you mean --images?"),
        (["report", "run", "--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_a_misspelt_option_or_task_is_named_with_the_one_that_is_meant(words, said, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert said in capsys.readouterr().err


def test_epochs_are_for_the_solver_that_has_them(run, pets, tmp_path, capsys):
    assert main(["eval", "linear", str(run), "--data", str(pets), "--cache", str(tmp_path), "--epochs", "3"]) == 2
    assert "--solver sgd" in capsys.readouterr().err
