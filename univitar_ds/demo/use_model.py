"""Opens the demo's exported model as a user would, and classifies held-out images by names."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from univitar_ds.evaluation.report import table
from univitar_ds.inference.model import UniViTARModel

SHOWN = 4
TEMPLATES = ("a {}", "a small {}", "a large {}")
"""The image templates of the demo's recipe."""


def classified(model_folder: Path, scenes: Path) -> str:
    """Returns a table of held-out images, each with its label and the most probable of all labels.

    Args: model_folder: the whole model in a run's export; scenes: the folder of `write_scenes`.
    """
    rows = [json.loads(line) for line in (scenes / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [row for row in rows if row["split"] == "test" and row["kind"] == "image" and row["label"]]
    names = sorted({row["label"] for row in held_out})
    shown = list({row["label"]: row for row in reversed(held_out)}.values())[:SHOWN]
    images = []
    for row in shown:
        with Image.open(scenes / row["file"]) as image:
            images.append(image.convert("RGB"))
    probabilities = UniViTARModel.from_pretrained(model_folder).zero_shot(images, names, TEMPLATES)
    lines = []
    for row, chances in zip(shown, probabilities, strict=True):
        best = int(chances.argmax())
        lines.append((row["file"], row["label"], names[best], f"{100 * chances[best]:.0f} %"))
    return table((f"zero-shot among {len(names)} names", "is", "named", "probability"), lines, left=3)
