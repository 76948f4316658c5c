"""The printed prediction of a step: a row for each recipe, GPU, number of GPUs and method, and sources of numbers."""

import pytest

from benchmarks.step_table import AFTER, BEFORE, GPUS, RANKS, RECIPES, assumptions, host_ratios, rows, table


def test_the_table_has_every_recipe_gpu_and_number_of_gpus():
    found = list(rows(BEFORE, AFTER))
    assert len(found) == len(RECIPES) * len(GPUS) * len(RANKS) * 2
    better = {(row["recipe"], row["gpu"], row["gpus"]): row["mfu_pct"] for row in found if row["method"] == "before"}
    for row in found:
        place = row["recipe"], row["gpu"], row["gpus"]
        assert row["method"] == "before" or row["mfu_pct"] > better[place]
    head, line, *lines = table(found)
    assert {text.count("|") for text in (head, line, *lines)} == {len(RANKS) + 2}
    assert len(lines) == len(RECIPES) * len(GPUS)
    assert all("(" in text or ":" in text for text in assumptions())


def test_host_ratios_come_from_rows_of_the_benchmark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label,configuration,ranks,ratio\na,zero2,8,1.4\nb,zero2,8,1.2\nb,zero2,256,1.3\na,zero3,8,4.5\n")
    assert host_ratios(path, "zero2") == {8: 1.2, 256: 1.3}
    assert host_ratios(path, "zero2", "a") == {8: 1.4}
    with pytest.raises(SystemExit, match="no row of zero1"):
        host_ratios(path, "zero1")
