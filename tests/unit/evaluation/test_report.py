"""Tables of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from univitar_ds.errors import UserError
from univitar_ds.evaluation.report import render_evaluation, render_run, render_times, table
from univitar_ds.evaluation.scores import Figure


def _evaluation() -> dict:
    figures = [
        Figure("zero-shot", "top-1", "image", 0.5, 0.0625, 293, 16, interval=(0.444, 0.556)),
        Figure("zero-shot", "top-1", "image", 0.25, 0.125, 40, 8, "birds"),
        Figure("text to video", "R@5", "video", 0.9, 0.3, 64, 187),
    ]
    return {
        "checkpoint": "step-00000070",
        "figures": [figure.to_dict() for figure in figures],
        "notes": ["No videos."],
        "seconds": 3.1,
    }


def test_every_figure_has_its_chance_level_the_ratio_and_the_count_beside_it():
    lines = render_evaluation(_evaluation()).splitlines()
    row = next(line for line in lines if line.startswith("| zero-shot of images"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "zero-shot of images", "top-1", "50.0 %", "44.4 to 55.6", "6.2 %", "8.0", "293", "16",
    ]  # fmt: skip
    assert any("zero-shot (birds)" in line for line in lines)
    assert "step-00000070" in lines[0]
    assert lines[-1] == "No videos."


def test_columns_are_even_and_the_table_is_markdown():
    lines = table(("name", "value"), [("a", "1"), ("a longer one", "10000000")], left=1).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].replace("-", "") == "||:|"
    assert lines[2].startswith("| a ")
    assert lines[2].endswith(" 1 |")


def test_times_end_with_their_sum():
    text = render_times({"packing": 4.25, "training": 361.0})
    assert "4.2 s" in text
    assert "6 min 01 s" in text
    assert text.splitlines()[-1].split("|")[2].strip() == "6 min 05 s"


def test_a_run_is_reported_from_its_files_and_an_empty_folder_is_an_error_message(tmp_path: Path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        render_run(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 70, "loss": 0.123456, "seconds": {"training": 5.0}}))
    assert "0.1235" in render_run(tmp_path)
    assert "5.0 s" in render_run(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(_evaluation()))
    assert "zero-shot of images" in render_run(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="evaluate the run again"):
        render_run(tmp_path)


def test_a_folder_that_is_no_run_is_refused_with_the_runs_that_are_near(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^photos does not exist; name a folder that `univitar-ds train` wrote, runs/NAME$"
    ):
        render_run("photos")
    for name in ("pets", "few"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").touch()
    for name in ("runs/photos", "photos"):
        with pytest.raises(UserError, match=f"^{name} does not exist; the runs in runs are few, pets$"):
            render_run(name)
    with pytest.raises(UserError, match=r"^runs is not the folder of a run .*; the runs in runs are few, pets$"):
        render_run("runs")
    with pytest.raises(UserError, match=r"^runs/few has no results yet .*`univitar-ds report runs/few --out"):
        render_run("runs/few")
