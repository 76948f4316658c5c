"""Draws that a run's order rests on: they must never change."""

from univitar_ds.data.randomness import draw, permutation


def test_a_draw_is_the_same_for_ever():
    assert draw(0) == 8493733112532773764
    assert draw(7, "units", "image", 3) == 3467772570552104442
    assert permutation(8, 1, "x") == [7, 3, 0, 2, 5, 4, 6, 1]


def test_keys_do_not_run_into_each_other():
    assert draw(1, 23) != draw(12, 3)
    assert draw("a", "b") != draw("ab")


def test_permutations_are_permutations_and_differ():
    assert sorted(permutation(100, 0, "p")) == list(range(100))
    assert permutation(100, 0, "p") != permutation(100, 1, "p")
