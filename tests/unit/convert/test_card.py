"""The model card: metadata for the hub, and only information that the source has."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from univitar_ds.convert.card import card, size_name
from univitar_ds.convert.conversion import Options, convert
from univitar_ds.convert.export import export_run, refresh_cards
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.recognise import open_stored


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "tried", run_config("data/shards"))
    return tmp_path / "tried"


def metadata(text: str) -> dict:
    _, header, rest = text.split("---\n", 2)
    assert rest.strip()
    return yaml.safe_load(header)


def test_a_run_s_card_has_its_sizes_recipe_and_data(run):
    stored = open_stored(run)
    text = card(stored, "hf", "apache-2.0")
    assert metadata(text)["license"] == "apache-2.0"
    assert metadata(text)["pipeline_tag"] == "zero-shot-image-classification"
    for said in (
        "3,344,064",
        "192, 7, 3",
        "data: shards",
        "sigmoid contrastive loss",
        "trust_remote_code=True",
        "both",
    ):
        assert said in text, said
    assert "## Results" not in text


def test_the_card_of_an_encoder_has_only_information_from_its_files(tmp_path):
    convert(golden(CASES[0]).folder, tmp_path / "out", "release", Options())
    text = (tmp_path / "out" / "README.md").read_text()
    assert metadata(text) == {
        "license": "unknown",
        "library_name": "univitar_ds",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["univitar", "vision", "native-resolution"],
    }
    assert "## Training" not in text


def test_a_card_has_the_results_of_its_own_checkpoint_with_their_chance_levels(run):
    export_run(run, run / "export")
    figure = {
        "task": "text to image",
        "measure": "R@1",
        "modality": "image",
        "value": 0.5,
        "chance": 0.125,
        "n": 8,
        "candidates": 8,
    }
    evaluation = {"checkpoint": "step-00000007", "weights": "trained", "figures": [figure], "notes": []}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    refresh_cards(run, run / "export")
    for place in ("export", "export/model"):
        text = (run / place / "README.md").read_text()
        assert "50.0 %" in text
        assert "12.5 %" in text
    evaluation["checkpoint"] = "step-00000003"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    refresh_cards(run, run / "export")
    assert "50.0 %" not in (run / "export" / "README.md").read_text()


def test_known_sizes_are_named(run):
    assert size_name(open_stored(run)) == "tiny"
    assert size_name(open_stored(golden(CASES[0]).folder)).endswith("M parameters")


def test_data_is_named_without_the_folders_that_hold_it(tmp_path):
    write_run(tmp_path / "tried", run_config(tmp_path / "secret" / "scenes"))
    text = card(open_stored(tmp_path / "tried"), "hf")
    assert "data: scenes\n" in text
    assert str(tmp_path) not in text
    assert "secret" not in text


@pytest.mark.parametrize(("source", "part", "said"), [
    ("/secret/runs/photos/export/model/", "model", "whole model of photos"),
    ("s3://secret/models/photos", "encoder", "encoder of photos"),
    ("lab/photos", "encoder", "encoder of lab/photos"),
])  # fmt: skip
def test_a_run_that_started_from_another_model_names_it(run, source, part, said):
    stored = open_stored(run)
    recipe = stored.origin["recipe"]
    model = recipe.model.model_copy(update={"init_from": source, "init_part": part})
    recipe = recipe.model_copy(update={"model": model})
    text = card(dataclasses.replace(stored, origin={**stored.origin, "recipe": recipe}), "hf")
    assert f"- started from: the {said}, whose samples are not counted\n" in text
    assert "secret" not in text
    assert "started from" not in card(stored, "hf")


def test_token_limits_of_images_and_of_videos_have_a_row_each(run):
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip()
        for line in card(open_stored(run), "hf").splitlines()
        if line.startswith("|")
    }
    assert (rows["image"], rows["video"]) == ("4 to 36 tokens", "8 to 64 tokens")
    assert "tokens of an item" not in rows


def snippet(folder: Path) -> str:
    """Returns the Python code of a card, with the placeholder `FOLDER` replaced by the variable `folder`."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", "folder")


ITEMS = [Image.new("RGB", (56, 28)), [Image.new("RGB", (28, 56))] * 2]


def test_the_snippet_of_an_encoder_s_program_runs_it(tmp_path):
    convert(golden(CASES[0]).folder, tmp_path / "out", "program")
    names = {"folder": tmp_path / "out", "items": ITEMS}
    exec(snippet(tmp_path / "out"), names)
    assert names["tokens"].shape == (len(names["pixel_values"]), names["prepare"].config.hidden_size)
    assert "embeddings" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_snippet_of_a_model_s_program_runs_it(run, tmp_path):
    convert(run, tmp_path / "out", "program")
    names = {"folder": tmp_path / "out", "items": ITEMS}
    exec(snippet(tmp_path / "out"), names)
    assert (names["tokens"].shape, names["embeddings"].shape) == ((16, 192), (2, 16))


def test_the_card_of_an_onnx_file_has_its_grids_and_type(run):
    stored = open_stored(run).converted(torch.float32)
    text = card(stored, "onnx", grids=[(1, 2, 4), (2, 4, 2)])
    assert "from_pretrained(FOLDER)\nsession = onnxruntime.InferenceSession" in text
    for said in ("(24, 1176) float32", "(24, 192) float32", "(2, 16) float32", "1 x 2 x 4 (images of 56 x 28 px)"):
        assert said in text, said


def test_other_types_than_float32_are_refused_for_onnx(run, tmp_path):
    options = Options(dtype=torch.bfloat16, grids=((1, 4, 4),))
    with pytest.raises(CheckpointError, match=r"bfloat16: an ONNX file has float32 weights; leave --dtype out"):
        convert(run, tmp_path / "out", "onnx", options)


@pytest.mark.slow
def test_the_snippet_of_an_onnx_file_runs_it(run, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx: pip install 'univitar_ds[onnx]'")
    half, folder = tmp_path / "half", tmp_path / "onnx"
    convert(run, half, "hf", Options(dtype=torch.bfloat16))
    convert(half, folder, "onnx", Options(grids=((1, 4, 4),)))
    names = {"folder": folder, "items": [Image.new("RGB", (56, 56))]}
    exec(snippet(folder), names)
    assert names["tokens"].shape == (16, 192)
    assert "stored as" in (folder / "README.md").read_text()
    assert "bfloat16" not in (folder / "README.md").read_text()
