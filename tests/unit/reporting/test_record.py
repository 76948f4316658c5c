"""Reading the folder of a run: long, damaged and unfinished logs."""

import pytest

from univitar_ds.errors import UserError
from univitar_ds.reporting.record import MOST_LINES, read_run


def test_a_long_log_is_subsampled_evenly_and_keeps_its_last_line(run_folder):
    steps = 3 * MOST_LINES
    run = read_run(run_folder("long", steps))
    assert run.stride == 4
    assert [line["step"] for line in run.lines] == [*range(1, steps + 1, 4), steps]


def test_damaged_lines_are_left_out(run_folder):
    folder = run_folder("cut")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\nnull\n{"loss": 3}\n{"step": 41, "samples_seen": 410, "loss": 1.0}\n{"step": 42, "lo')
    assert [line["step"] for line in read_run(folder).lines] == list(range(1, 42))


def test_a_run_in_training_has_neither_results_nor_summary(run_folder):
    folder = run_folder("young", 1)
    for name in ("evaluation.json", "summary.json", "events.jsonl", "examples-image.png"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.evaluation, run.summary, run.events, run.examples) == ({}, {}, [], {})


def test_a_folder_that_is_no_run_and_a_damaged_result_are_named(run_folder, tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.yaml\); "):
        read_run(tmp_path)
    folder = run_folder("damaged")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json is not JSON .*evaluate the run again"):
        read_run(folder)
    (folder / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluation\.json holds no JSON object"):
        read_run(folder)
