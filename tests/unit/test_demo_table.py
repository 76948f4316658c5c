"""What the demo prints at its end, without a training."""

import json

from univitar_ds import demo


def test_the_demo_says_that_its_results_differ_between_processors(monkeypatch, tmp_path, capsys):
    def trained(recipe, nproc, overrides):
        run = tmp_path / "runs" / "demo"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"seconds": {"training": 61.0}}))
        return 0

    monkeypatch.setattr(demo, "write_scenes", lambda *args, **options: None)
    monkeypatch.setattr(demo, "pack_folder", lambda *args, **options: None)
    monkeypatch.setattr(demo.launch, "train", trained)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert demo.run_demo(tmp_path, 2, 100.0) == 0
    printed = capsys.readouterr().out
    assert "| installation" in printed
    assert "differ by a few points between processors and between seeds (README, Two commands)" in printed
