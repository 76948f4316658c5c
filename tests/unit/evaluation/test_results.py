"""Reading results in the folder of a run that are damaged, or that another program wrote."""

import json

import pytest

from tests.unit.reporting.conftest import run_folder  # noqa: F401
from univitar_ds.cli.main import main
from univitar_ds.evaluation.results import read_evaluation, read_summary

FIGURE = {"task": "zero-shot", "measure": "top-1", "modality": "image", "value": 0.2, "chance": 0.1, "n": 5,
          "candidates": 10, "interval": [0.1, 0.3]}  # fmt: skip
WHOLE = {"checkpoint": "step-00000007", "weights": "trained", "figures": [FIGURE], "notes": []}


def test_results_are_returned_as_they_are_and_none_are_empty(tmp_path):
    assert (read_evaluation(tmp_path), read_summary(tmp_path)) == ({}, {})
    (tmp_path / "evaluation.json").write_text(json.dumps({**WHOLE, "seconds": 3.0}))
    assert read_evaluation(tmp_path) == {**WHOLE, "seconds": 3.0}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("evaluation", {}, "checkpoint is missing; evaluate the run again"),
        ("evaluation", {**WHOLE, "figures": [1]}, "figures.0 is 1 and should be a dictionary"),
        ("evaluation", {**WHOLE, "figures": None}, "figures is None and should be a list"),
        ("evaluation", {**WHOLE, "notes": [3]}, "notes.0 is 3 and should be a string"),
        ("evaluation", {**WHOLE, "figures": [{**FIGURE, "task": None}]}, "figures.0.task is None"),
        ("evaluation", {**WHOLE, "figures": [{**FIGURE, "value": "much"}]}, "figures.0.value is 'much'"),
        ("evaluation", {**WHOLE, "figures": [{**FIGURE, "chance": 0}]}, "figures.0.chance is 0 and should be greater"),
        ("evaluation", {**WHOLE, "figures": [{**FIGURE, "interval": [1]}]}, "figures.0.interval.1 is missing"),
        ("evaluation", {**WHOLE, "figures": [{**FIGURE, "set": ["a"]}]}, "figures.0.set is ['a']"),
        ("evaluation", [], "holds no JSON object"),
        ("summary", "text", "holds no JSON object; remove it"),
        ("summary", {"last": 3}, "last is 3"),
        ("summary", {"seconds": [1]}, "seconds is [1] and should be a dictionary"),
        ("summary", {"parameters": 10**400}, "is above 64 bits"),
    ],
)
def test_damage_is_an_error_message_for_the_table_and_the_page(tmp_path, capsys, run_folder, name, content, said):  # noqa: F811
    run = run_folder("damaged", 2)
    (run / f"{name}.json").write_text(json.dumps(content))
    for arguments in ([], ["--out", str(tmp_path / "page.html")]):
        assert main(["report", str(run), *arguments]) == 2
        assert said in capsys.readouterr().err
