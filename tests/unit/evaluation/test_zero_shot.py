"""Zero-shot classification, with a text tower that is a table."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.closeness import assert_sums_close
from tests.unit.evaluation.made import made, random_rows
from univitar_ds.evaluation import scores
from univitar_ds.evaluation import zero_shot as module
from univitar_ds.evaluation.zero_shot import class_vectors, zero_shot

AXES = {"cat": 0, "dog": 1, "emu": 2, "fox": 3, "gnu": 4, "hen": 5}


def texts(sentences: Sequence[str]) -> Tensor:
    """The vector of a sentence is the axis of the animal that it names."""
    rows = torch.zeros(len(sentences), 8)
    for row, sentence in enumerate(sentences):
        rows[row, next(axis for animal, axis in AXES.items() if animal in sentence)] = 1
    return rows


def on_axes(labels: Sequence[str]) -> Tensor:
    return torch.eye(8)[[AXES[label] for label in labels]]


def _made(vision: Tensor, labels: list[str | None], sets: list[str | None] | None = None):
    return made(vision, vision, ["caption"] * len(labels), labels, sets)


def test_items_at_their_label_are_right_and_items_elsewhere_wrong():
    labels = ["cat", "dog", "emu", "cat"]
    figures, notes = zero_shot(_made(on_axes(["cat", "dog", "cat", "dog"]), labels), ["a {}"], texts)
    assert notes == []
    top1, per_class = figures
    assert (top1.measure, top1.value, top1.n, top1.candidates) == ("top-1", 0.5, 4, 3)
    assert top1.chance == pytest.approx(1 / 3)
    assert per_class.value == pytest.approx((0.5 + 1 + 0) / 3), "cat half, dog whole, emu none"


def test_top_five_counts_five_and_is_left_out_where_it_takes_in_all():
    labels = list(AXES)
    figures, _ = zero_shot(_made(on_axes(labels), labels), ["{}"], texts)
    assert {figure.measure: figure.chance for figure in figures}["top-5"] == pytest.approx(5 / 6)
    figures, _ = zero_shot(_made(on_axes(labels[:5]), labels[:5]), ["{}"], texts)
    assert "top-5" not in {figure.measure for figure in figures}


def test_a_model_that_embeds_everything_alike_gets_the_chance_level():
    labels = ["cat"] * 7 + ["dog", "emu"]
    found = _made(torch.ones(9, 8), labels)
    figures, _ = zero_shot(found, ["a {}"], lambda sentences: torch.ones(len(sentences), 8))
    assert all(figure.value == pytest.approx(1 / 3) for figure in figures)


def test_always_naming_the_largest_class_does_not_raise_the_mean_of_classes():
    labels = ["cat"] * 7 + ["dog", "emu"]
    figures, _ = zero_shot(_made(on_axes(["cat"] * 9), labels), ["a {}"], texts)
    values = {figure.measure: figure.value for figure in figures}
    assert values["top-1"] == pytest.approx(7 / 9)
    assert values["top-1, mean of classes"] == pytest.approx(1 / 3)


def test_items_without_label_are_not_scored():
    figures, _ = zero_shot(_made(on_axes(["cat", "dog", "emu"]), ["cat", None, "emu"]), ["a {}"], texts)
    assert figures[0].n == 2
    assert figures[0].candidates == 2
    assert figures[0].value == 1.0


def test_a_single_label_is_reported_and_not_measured():
    figures, notes = zero_shot(_made(on_axes(["cat", "cat"]), ["cat", "cat"]), ["a {}"], texts)
    assert figures == []
    assert len(notes) == 1
    assert "'cat'" in notes[0]
    figures, notes = zero_shot(_made(on_axes(["cat"]), [None]), ["a {}"], texts)
    assert figures == []
    assert "no item has a label" in notes[0]


def test_each_data_set_is_scored_among_its_own_labels():
    labels = ["cat", "dog", "emu", "fox", "gnu"]
    sets = ["pets", "pets", "wild", "wild", "lone"]
    figures, notes = zero_shot(_made(on_axes(labels), labels, sets), ["a {}"], texts)
    assert [(f.set, f.candidates) for f in figures if f.measure == "top-1"] == [("pets", 2), ("wild", 2)]
    assert len(notes) == 1
    assert "lone" in notes[0]


@pytest.mark.numeric
def test_the_vector_of_a_class_is_the_unit_mean_over_the_templates():
    table = {"a cat": 0, "the cat": 1, "a dog": 2, "the dog": 3}
    rows = F.normalize(random_rows(4), dim=-1)
    got = class_vectors(["cat", "dog"], ["a {}", "the {}"], lambda sentences: rows[[table[s] for s in sentences]])
    assert_sums_close(got, F.normalize(torch.stack([rows[0] + rows[1], rows[2] + rows[3]]), dim=-1), 2 + 12)


def test_classes_are_embedded_in_parts_that_give_the_same_vectors_and_figures(monkeypatch):
    labels = [list(AXES)[row % 6] for row in range(40)]
    found = _made(random_rows(40, 8), labels)
    whole = zero_shot(found, ["a {}", "the {}"], texts)
    asked: list[int] = []
    monkeypatch.setattr(module, "MAX_SENTENCES", 5)
    monkeypatch.setattr(scores, "CELLS", 13)
    assert zero_shot(found, ["a {}", "the {}"], lambda some: asked.append(len(some)) or texts(some)) == whole
    assert asked == [4, 4, 4]


class Label(str):
    """Counts how often labels are compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Label.compared += 1
        return str.__eq__(self, other)


def test_the_classes_of_items_are_not_found_by_looking_through_all_of_them():
    names = [f"{row:03d} {list(AXES)[row % 6]}" for row in range(300)]
    zero_shot(_made(random_rows(300, 8), [Label(name) for name in names]), ["{}"], texts)
    assert Label.compared < 10 * 300
