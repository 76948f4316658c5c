"""Random draws that determine the order of a run. They must never change."""

from univitar_ds.randomness import draw, draws, permutation


def test_a_draw_is_the_same_in_every_version():
    assert draw(0) == 8493733112532773764
    assert draw(7, "units", "image", 3) == 3467772570552104442
    assert permutation(8, 1, "x") == [7, 3, 0, 2, 5, 4, 6, 1]
    assert draws(2, 7, "patches", 3).tolist() == [7793631619983537638, 9884311198532528329]


def test_different_keys_have_different_draws():
    assert draw(1, 23) != draw(12, 3)
    assert draw("a", "b") != draw("ab")
    assert draws(1, 1, 23)[0] != draws(1, 12, 3)[0]


def test_many_draws_begin_with_those_of_few_and_are_even():
    many = draws(10_000, 0, "p")
    assert draws(3, 0, "p").tolist() == many[:3].tolist()
    assert len(draws(0, 0, "p")) == 0
    # The mean of n uniform numbers has the deviation (12 n)^-1/2; five of them.
    assert abs(float(many.mean()) / 2**64 - 0.5) < 5 * (12 * 10_000) ** -0.5


def test_permutations_are_permutations_and_differ():
    assert sorted(permutation(100, 0, "p")) == list(range(100))
    assert permutation(100, 0, "p") != permutation(100, 1, "p")
    assert permutation(100, 0, "p") == sorted(range(100), key=lambda index: draw(0, "p", index))
