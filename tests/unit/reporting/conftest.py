"""Folders of runs as the trainer leaves them, without training."""

import json

import pytest
from PIL import Image

from tests.support.finished import run_config
from univitar_ds.config.load import dump_config


@pytest.fixture
def run_folder(tmp_path):
    """Returns a function that writes the folder of a run with `steps` lines of metrics. `changes`: of its run file."""

    def written(name: str, steps: int = 40, value: float = 0.25, **changes):
        run = tmp_path / name
        run.mkdir()
        dump_config(run_config(name=name, **changes), run / "config.yaml")
        lines = [
            {
                "step": step, "stage": "fixed" if step <= steps // 2 else "native", "samples_seen": 10 * step,
                "loss": 4.0 / step, "loss_image": 4.0 / step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 100.0,
                "samples_per_s": 5.0, "mfu_pct": 30.0, "data_wait_pct": 1.0, "fill_pct": 99.0, "bad_samples": 0,
            }
            for step in range(1, steps + 1)
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        events = [
            {"step": 0, "event": "stage", "stage": "fixed", "samples_seen": 0},
            {"step": 7, "event": "skipped", "reason": "loss is nan", "samples": []},
        ]
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        figure = {
            "task": "zero-shot", "measure": "top-1", "modality": "image", "value": value, "chance": 0.1, "n": 50,
            "candidates": 10, "interval": [value - 0.05, value + 0.05],
        }  # fmt: skip
        result = {"checkpoint": "step-00000040", "weights": "trained", "figures": [figure], "notes": ["a <b>note</b>"]}
        (run / "evaluation.json").write_text(json.dumps(result))
        (run / "summary.json").write_text(json.dumps({"name": name, "completed": True, "ranks": 2, "seconds": {}}))
        Image.effect_noise((2000, 1200), 90).convert("RGB").save(run / "examples-image.png")
        return run

    return written
