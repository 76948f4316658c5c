"""The model card: metadata that the hub reads, and only what the source says."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from univitar_ds.convert.card import card, size_name
from univitar_ds.convert.conversion import Options, convert
from univitar_ds.convert.export import export_run, refresh_cards
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
    for said in ("3,344,064", "192, 7, 3", "data/shards", "sigmoid contrastive loss", "trust_remote_code=True", "both"):
        assert said in text, said
    assert "## Results" not in text


def test_an_encoder_s_card_says_nothing_that_its_files_do_not(tmp_path):
    convert(golden(CASES[0]).folder, tmp_path / "out", "release", Options())
    text = (tmp_path / "out" / "README.md").read_text()
    assert metadata(text) == {
        "license": "unknown",
        "library_name": "univitar_ds",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["univitar", "vision", "native-resolution"],
    }
    assert "## Training" not in text


def test_results_come_with_their_chance_once_the_run_is_evaluated(run):
    export_run(run, run / "export")
    figure = {"task": "retrieval", "measure": "top-1", "value": 0.5, "chance": 0.125, "n": 8, "candidates": 8}
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
