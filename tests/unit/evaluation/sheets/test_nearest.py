"""The captions nearest to an item, and the items nearest to a caption."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.unit.evaluation.made import made
from univitar_ds.evaluation.sheets.nearest import nearest_captions, nearest_items


def test_nearest_captions_are_distinct_and_the_own_one_is_marked():
    rows = torch.eye(4)
    found = made(rows[[0, 0, 1, 2]], rows[[0, 0, 1, 2]], ["same", "same", "other", "third"])
    nearest = nearest_captions(found, 1)
    assert found.captions[nearest.best[0][0]] == "same"
    assert len({found.captions[row] for row, _, _ in nearest.best}) == 3
    assert [right for _, right, _ in nearest.best] == [True, False, False]
    assert (nearest.rank, nearest.cosine, nearest.count) == (1, 1.0, 3)


def test_the_place_of_the_own_caption_counts_all_captions():
    text = torch.tensor([[1.0, 3.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 4.0]])
    found = made(torch.tensor([[1.0, 0.0]]).expand(5, 2), text, list("abcde"))
    nearest = nearest_captions(found, 0)
    assert [found.captions[row] for row, _, _ in nearest.best] == ["b", "c", "d"]
    assert not any(right for _, right, _ in nearest.best)
    assert (nearest.rank, nearest.count) == (4, 5)
    assert nearest.cosine == pytest.approx(10**-0.5)


def test_equal_captions_come_before_the_own_one():
    """Else a model that has collapsed would have every caption right."""
    ones = torch.ones(4, 2)
    assert nearest_captions(made(ones, ones, list("abcd")), 0).rank == 4


def test_nothing_is_correct_for_a_model_with_nan_weights():
    rows = torch.eye(4)
    for found in (made(rows * torch.nan, rows, list("abcd")), made(rows, rows * torch.nan, list("abcd"))):
        for nearest in (nearest_captions(found, 0), nearest_items(found, 0, [0, 1, 2, 3])):
            assert nearest.rank == 4
            assert math.isnan(nearest.cosine)
            assert [right for _, right, _ in nearest.best[:3]] == [False] * 3
            assert all(math.isnan(cosine) for _, _, cosine in nearest.best)


def test_an_incorrect_candidate_with_nan_is_before_the_correct_one():
    rows = torch.eye(4)
    text = rows.clone()
    text[3] = torch.nan
    nearest = nearest_captions(made(rows, text, list("abcd")), 0)
    assert [(row, right) for row, right, _ in nearest.best[:2]] == [(3, False), (0, True)]
    assert (nearest.rank, nearest.cosine) == (2, 1.0)


def test_a_further_caption_of_an_item_is_its_own():
    rows = torch.eye(3)
    found = made(rows[[0, 1]], rows[[1, 0]], ["a cat", "a small cat"])
    assert nearest_captions(found, 0).rank == 2
    both = replace(found, others=[("a small cat",), ()])
    nearest = nearest_captions(both, 0)
    assert nearest.rank == 1
    assert [right for _, right, _ in nearest.best] == [True, True]


def test_an_item_without_a_caption_has_no_nearest_ones():
    rows = torch.eye(3)
    assert nearest_captions(made(rows[[0, 1]], rows[[0, 1]], ["", "b"], ["cat", None]), 0) is None


def test_all_items_with_a_caption_are_correct_and_only_candidates_are_found():
    vision = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [1.0, 0.1]])
    found = made(vision, torch.tensor([[1.0, 0.0]]).expand(5, 2), ["cat", "dog", "cat", "dog", "bird"])
    nearest = nearest_items(found, 0, [0, 1, 2, 3])
    assert [(row, right) for row, right, _ in nearest.best] == [(1, False), (2, True), (3, False), (0, True)]
    assert (nearest.rank, nearest.count) == (2, 4)
    assert nearest.cosine == pytest.approx(0.5**0.5)
    assert nearest_items(found, 0, [1, 3]) is None, "no candidate has the caption"
    further = replace(found, others=[(), ("cat",), (), (), ()])
    assert nearest_items(further, 0, [1, 3]).rank == 1
