"""The table of metrics in docs/training.md has the names that are written, in the groups that TensorBoard shows."""

import re

import torch

from tests.support.paths import ROOT
from univitar_ds.training.engine.optim import GRADIENT_PARTS
from univitar_ds.training.logging.board import GROUPS, tag
from univitar_ds.training.logging.metrics import BAD_OF_KIND, IGNORED_OF_KIND, OVER_RANKS, Window, part_norms
from univitar_ds.training.step.curriculum import Progress
from univitar_ds.training.step.peak_flops import Peak
from univitar_ds.training.step.train_step import StepResult
from univitar_ds.training.watch.phases import PHASES
from univitar_ds.training.watch.slow_ranks import times_over_ranks

PARTS = ("contrastive", "classification", "distill_patch", "distill_pooled")
WEIGHTS = dict.fromkeys(("contrastive", "classification", "distill"), 0.5)
PLACES = {
    "<modality>": ("image", "video"),
    "<part>": PARTS,
    "bad_<kind>": tuple(BAD_OF_KIND),
    "ignored_<kind>": tuple(IGNORED_OF_KIND),
}


def documented() -> dict[str, str]:
    """Groups of the names in docs/training.md, by name."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| group \| names \| what \|\n\|---\|---\|---\|\n((?:\|.*\|\n)+)", text)
    found: dict[str, str] = {}
    for row in table.splitlines():
        group, names, _ = (cell.strip() for cell in row.strip("|").split("|"))
        for pattern in re.findall(r"`([^`]+)`", names):
            for name in expanded(pattern):
                assert name not in found, f"{name} is documented twice"
                found[name] = group.strip("`")
    return found


def expanded(pattern: str) -> list[str]:
    for place, values in PLACES.items():
        if place in pattern:
            return [name for value in values for name in expanded(pattern.replace(place, value, 1))]
    return [pattern]


def written() -> set[str]:
    """All names that a line of metrics can have: of a window with every loss, weight and kind of bad sample."""
    window = Window()
    numbers = dict.fromkeys(OVER_RANKS, 1.0)
    losses = dict.fromkeys(PARTS, 1.0)
    result = StepResult(1.0, 4, grad_norm=1.0, logit_scale=1.0, logit_bias=0.0, losses=losses, agreement=0.5)
    for modality in ("image", "video"):
        window.add(result, numbers, modality, WEIGHTS)
    guarded = {"rollbacks": 1, "skipped_updates": 1}
    given = {"lr": 0.1, "peak": Peak(1e-9, False), "ranks": 1, "guarded": guarded}
    given["further"] = part_norms(numbers) | times_over_ranks(torch.ones(2, len(PHASES)))
    line = window.line(Progress(step=2), (0, "a"), result, **given)
    return set(line)


def test_readme_has_the_names_that_are_written():
    assert documented().keys() == written()


def test_readme_has_the_groups_of_tensorboard():
    for name, group in documented().items():
        if group != "no curve":
            assert tag(name) == f"{group}/{name}"
    assert {group for group, _ in GROUPS} == set(documented().values()) - {"no curve"}


def test_the_losses_and_parts_in_this_test_are_those_of_the_steps():
    sources = "".join(path.read_text() for path in sorted((ROOT / "univitar_ds/training/step").glob("*.py")))
    found = set(re.findall(r'losses=\{"(\w+)":', sources)) | {f"distill_{name}" for name in ("patch", "pooled")}
    assert found == set(PARTS)
    assert "distill_patch" in sources
    assert all(f"grad_norm_{part}" in written() for part in GRADIENT_PARTS)


def test_labels_of_readme_about_kinds_are_the_kinds():
    (kinds,) = re.findall(r"one of their texts was ignored \(([^)]+)\)", (ROOT / "docs" / "training.md").read_text())
    assert {f"ignored_{kind}" for kind in re.findall(r"`(\w+)`", kinds)} == set(IGNORED_OF_KIND)
