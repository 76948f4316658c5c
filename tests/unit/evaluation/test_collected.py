"""The table of many evaluations."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from univitar_ds.cli.main import main
from univitar_ds.errors import ConfigError, DataError, UserError
from univitar_ds.evaluation.collected import collect, render, write_table
from univitar_ds.evaluation.scores import Figure


def result(path: Path, model: str, data: str, *figures: Figure) -> Path:
    content = {"format": 1, "task": "x", "model": model, "data": data, "figures": [one.to_dict() for one in figures]}
    path.write_text(json.dumps(content))
    return path


def top1(value: float, name: str | None = None) -> Figure:
    return Figure("zero-shot", "top-1", "image", value, 0.25, 40, 4, name, (value - 0.1, value + 0.1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    result(tmp_path / "a.json", "runs/a/checkpoints/step-00000010", "data/pets", top1(0.5), top1(0.75, "birds"))
    result(tmp_path / "b.json", "runs/b", "data/pets", top1(0.625))
    recall = Figure("image to text", "R@1", "image", 0.1, 0.01, 100, 100)
    result(tmp_path / "c.json", "runs/b", "data/coco", recall)
    return tmp_path


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("|")]


def test_a_row_for_each_figure_and_a_column_for_each_model(folder: Path):
    heads, _, *rows = rows_of(render(collect([folder])))
    assert heads == ["data", "task", "measure", "chance", "n", "among", "a/checkpoints/step-00000010", "b"]
    assert rows == [
        ["pets", "zero-shot of images", "top-1", "25.0 %", "40", "4", "50.0 %", "62.5 %"],
        ["pets", "zero-shot (birds)", "top-1", "25.0 %", "40", "4", "75.0 %", "-"],
        ["coco", "image to text", "R@1", "1.0 %", "100", "100", "-", "10.0 %"],
    ]


def test_of_a_figure_in_two_files_the_last_is_used_with_a_note(folder: Path):
    again = result(folder / "again.json", "runs/b", "data/pets", top1(0.875))
    text = render(collect([folder / "b.json", again]))
    assert rows_of(text)[2][-1] == "87.5 %"
    assert text.endswith("1 figures were in several files; those of the last file are shown.")


def test_the_command_prints_the_table_and_saves_it_as_markdown_or_csv(folder: Path, tmp_path: Path, capsys):
    for name in ("table.md", "table.csv"):
        for _ in range(2):  # its own file is replaced
            assert main(["eval", "table", str(folder), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "table.md").read_text().strip() == render(collect([folder]))
    assert capsys.readouterr().out.count("zero-shot (birds)") == 4
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [float(line["value"]) for line in lines] == [0.5, 0.625, 0.75, 0.1]
    assert (lines[2]["set"], lines[2]["model"]) == ("birds", "runs/a/checkpoints/step-00000010")


def test_results_of_a_run_are_collected_too(folder: Path):
    content = {"format": 1, "checkpoint": "step-00000070", "weights": "trained", "figures": [top1(0.5).to_dict()]}
    content |= {"notes": [], "sources": [{"path": "data/photos", "split": "test"}]}
    (folder / "run.json").write_text(json.dumps(content))
    heads, _, row = rows_of(render(collect([folder / "run.json"])))
    assert heads[-1] == "step-00000070"
    assert row[0] == "data/photos"


@pytest.mark.parametrize("content", ["{", "[]", '{"figures": [{"task": "x"}]}', '{"model": 3, "figures": []}', ""])
def test_a_damaged_file_is_left_out_and_named(folder: Path, content: str, caplog):
    (folder / "b.json").write_text(content)
    found = collect([folder])
    assert [row[-1] for row in rows_of(render(found))[2:]] == ["-", "-", "10.0 %"]
    assert "1 files are left out: " in render(found)
    for text in (render(found), caplog.text):
        assert f"{folder / 'b.json'} " in text
        assert "measure it again, or remove it" in text
    with pytest.raises(UserError, match=r"b\.json .*measure it again, or remove it"):
        collect([folder / "b.json"])
    (folder / "c.json").write_text("{")
    with pytest.raises(DataError, match=r"none of the 2 results can be read: .*/b\.json "):
        collect([folder / "b.json", folder / "c.json"])


def test_in_a_folder_a_link_that_leads_nowhere_is_left_out_and_an_argument_is_not(folder: Path):
    (folder / "b.json").unlink()
    (folder / "b.json").symlink_to(folder / "removed.json")
    found = collect([folder])
    assert [row[-1] for row in rows_of(render(found))[2:]] == ["-", "-", "10.0 %"]
    assert "1 files are left out: there is no file " in render(found)
    with pytest.raises(UserError, match=r"there is no file .*b\.json"):
        collect([folder, folder / "b.json"])


def test_no_result_and_a_file_of_others_are_error_messages(folder: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no result in"):
        collect([tmp_path / "empty"])
    with pytest.raises(UserError, match="there is no file"):
        collect([tmp_path / "nothing.json"])
    for content in (b"mine\n", b"\xff\x00"):
        (tmp_path / "notes.md").write_bytes(content)
        with pytest.raises(ConfigError, match="has not written"):
            write_table(collect([folder]), tmp_path / "notes.md")
        assert (tmp_path / "notes.md").read_bytes() == content


@pytest.mark.parametrize("name", ["all.md", "all.csv"])
def test_a_name_that_is_not_utf_8_is_escaped(tmp_path: Path, name: str):
    found = collect([result(tmp_path / "a.json", os.fsdecode(b"runs/\xff"), "data/pets", top1(0.5))])
    write_table(found, tmp_path / name)
    assert r"runs/\udcff" in (tmp_path / name).read_text(encoding="utf-8")


def test_a_name_cannot_break_the_table(tmp_path: Path):
    result(tmp_path / "a.json", "runs/a|b\nc", "data/pets", top1(0.5))
    head, _, row = (line for line in render(collect([tmp_path])).splitlines() if line.startswith("|"))
    assert head.endswith(r"| runs/a\|b c |")
    assert len(head) == len(row)


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path):
    result(tmp_path / "a.json", "runs/a", "data/pets", top1(float("nan")))
    with pytest.raises(UserError, match=r"a\.json is damaged: figures\.0\.value is nan"):
        collect([tmp_path])
