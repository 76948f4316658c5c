"""Ranks with ties, compared with counting every order, and accuracies, compared with scikit-learn."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from univitar_ds.evaluation.scores import accuracies, chance_at, hit_at, rank_counts


def test_accuracies_without_ties_are_those_of_scikit_learn():
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    draws = torch.Generator().manual_seed(0)
    truth = torch.cat([torch.arange(9), torch.randint(9, (391,), generator=draws)])
    scores = torch.rand(400, 9, generator=draws, dtype=torch.float64) + 0.5 * torch.eye(9)[truth]
    counts = rank_counts(scores, truth[:, None] == torch.arange(9))
    found = accuracies(truth, {k: hit_at(k, *counts) for k in (1, 5)}, "task", "image", 9)
    wanted = [top_k_accuracy_score(truth, scores, k=k) for k in (1, 5)]
    wanted.append(balanced_accuracy_score(truth, scores.argmax(1)))
    assert [figure.value for figure in found] == pytest.approx(wanted, rel=1e-12)
    assert 0.2 < wanted[0] < wanted[1] < 1


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("better", "tied", "right"), [(0, 0, 1), (1, 2, 1), (0, 3, 2), (2, 0, 3), (1, 4, 1), (6, 1, 1)]
)
def test_hits_among_equal_scores_are_the_average_over_every_order(k: int, better: int, tied: int, right: int):
    orders = list(permutations([False] * tied + [True] * right))
    by_hand = sum(any(([False] * better + list(order))[:k]) for order in orders) / len(orders)
    got = hit_at(k, torch.tensor([better]), torch.tensor([tied]), torch.tensor([right]))
    assert got.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(
    ("k", "right", "candidates"), [(1, 1, 7), (3, 1, 7), (2, 3, 6), (5, 2, 5), (9, 1, 4), (4, 3, 6)]
)
def test_chance_is_the_share_of_random_orders_with_a_right_one_in_front(k: int, right: int, candidates: int):
    orders = list(permutations([True] * right + [False] * (candidates - right)))
    assert chance_at(k, right, candidates) == pytest.approx(sum(any(o[:k]) for o in orders) / len(orders), abs=1e-12)


def test_candidates_that_score_better_or_equal_are_counted_and_worse_ones_are_not():
    scores = torch.tensor([[0.9, 0.5, 0.5, 0.5 + 1e-9, 0.2, 0.1]], dtype=torch.float64)
    right = torch.tensor([[False, True, False, False, True, False]])
    better, tied, equal_right = rank_counts(scores, right)
    assert (better.item(), tied.item(), equal_right.item()) == (1, 2, 1)


@pytest.mark.parametrize("nan", [[0], [1], [0, 1, 2]])
def test_a_score_that_is_no_number_is_no_hit(nan: list[int]):
    scores = torch.tensor([[0.5, 0.2, 0.1]], dtype=torch.float64)
    scores[0, nan] = torch.nan
    assert hit_at(1, *rank_counts(scores, torch.tensor([[True, False, False]]))).tolist() == [0.0]
