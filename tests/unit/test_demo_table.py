"""The table that the demo prints at its end, without a training."""

import json

from univitar_ds.demo import end_to_end


def test_the_demo_prints_that_its_results_differ_between_processors(monkeypatch, tmp_path, capsys):
    def trained(recipe, nproc, overrides):
        run = tmp_path / "runs" / "demo"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"seconds": {"training": 61.0}}))
        return 0

    monkeypatch.setattr(end_to_end, "write_scenes", lambda *args, **options: None)
    monkeypatch.setattr(end_to_end, "pack_folder", lambda *args, **options: None)
    monkeypatch.setattr(end_to_end.launch, "train", trained)

    def written(folders, out, options):
        assert (folders, out) == ([tmp_path / "runs" / "demo"], tmp_path / "report.html")
        assert options.images == ()  # held-out items
        yield from ("the results", "page in report.html")

    monkeypatch.setattr(end_to_end, "write_page", written)
    monkeypatch.setattr(end_to_end, "classified", lambda *folders: "the table of names")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert end_to_end.run_demo(tmp_path, 2, 100.0) == 0
    printed = capsys.readouterr().out
    assert "| installation" in printed
    assert "| drawing the page" in printed
    assert "the results" not in printed  # the training has printed them
    assert printed.endswith("look at the page in report.html.\n")
    assert "differ by a few points between processors, and more between seeds (docs/results.md)" in printed
