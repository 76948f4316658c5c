"""Recall in both directions on vectors whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.unit.evaluation.made import made, random_rows
from univitar_ds.evaluation import retrieval as module
from univitar_ds.evaluation import scores
from univitar_ds.evaluation.retrieval import retrieval
from univitar_ds.tokenization import caption_id


def _by_name(found) -> dict[tuple[str, str], object]:
    return {(figure.task, figure.measure): figure for figure in retrieval(found)}


def test_matching_vectors_find_each_other():
    rows = random_rows(30)
    figures = retrieval(made(rows, rows, [f"caption {i}" for i in range(30)]))
    assert len(figures) == 6
    assert all(figure.value == 1.0 and figure.n == figure.candidates == 30 for figure in figures)


def test_a_model_that_embeds_everything_alike_gets_the_chance_level_exactly():
    same = torch.ones(40, 9)
    captions = [f"caption {i % 23}" for i in range(40)]
    for figure in retrieval(made(same, same, captions)):
        assert figure.value == pytest.approx(figure.chance, abs=1e-9)
        assert 0 < figure.chance < 1


def test_chance_levels_are_the_counted_ones():
    captions = ["a", "a", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    figures = _by_name(made(random_rows(12), random_rows(12, seed=1), captions))
    assert figures["image to text", "R@1"].chance == pytest.approx(1 / 10)
    assert figures["image to text", "R@5"].chance == pytest.approx(5 / 10)
    assert ("image to text", "R@10") not in figures, "ten of ten captions say nothing"
    assert figures["text to image", "R@1"].chance == pytest.approx((3 / 12 + 9 / 12) / 10)
    assert figures["text to image", "R@1"].n == 10
    assert figures["image to text", "R@1"].n == 12


def test_any_item_with_the_caption_is_right_and_equal_captions_are_one_candidate():
    east, north, west = torch.eye(4)[0], torch.eye(4)[1], -torch.eye(4)[0]
    fill = random_rows(3, 4, seed=2) * 0.01 - torch.eye(4)[3]
    # "dog" is nearest to the second dog; the vector of the first dog's image is that of the caption "cat".
    vision = torch.stack([north, east, north, *fill])
    text = torch.stack([east, east, north + 0.1 * west, *fill])
    figures = _by_name(made(vision, text, ["dog", "dog", "cat", "x", "y", "z"]))
    assert figures["text to image", "R@1"].candidates == 6
    # "cat" has a tie between the first dog's image and its own: both have the same vector.
    assert figures["text to image", "R@1"].value == pytest.approx((1 + 0.5 + 3) / 5)
    assert figures["image to text", "R@1"].candidates == 5
    assert figures["image to text", "R@1"].value == pytest.approx(5 / 6)


def test_unrelated_vectors_are_near_chance():
    captions = [f"caption {i % 150}" for i in range(300)]
    for figure in retrieval(made(random_rows(300, 16), random_rows(300, 16, seed=5), captions)):
        spread = (figure.chance * (1 - figure.chance) / figure.n) ** 0.5
        assert abs(figure.value - figure.chance) < 4 * spread + 0.01


@pytest.mark.numeric
def test_the_order_of_the_items_and_the_size_of_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch):
    vision = random_rows(50, 6)
    captions = [f"caption {i % 37}" for i in range(50)]
    text = random_rows(37, 6, seed=9)[torch.arange(50) % 37] + 0 * vision
    before = {key: figure.value for key, figure in _by_name(made(vision + text, text, captions)).items()}
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(scores, "CHUNK", 7)
    monkeypatch.setattr(scores, "CELLS", 200)
    shuffled = made((vision + text)[order], text[order], [captions[i] for i in order])
    after = {key: figure.value for key, figure in _by_name(shuffled).items()}
    assert before.keys() == after.keys()
    assert_sums_close([*map(float, after.values())], [*map(float, before.values())], 50, dtype=torch.float64)
    assert 0.2 < before["image to text", "R@1"] < 1


def test_no_items_give_no_figures():
    assert retrieval(made(torch.empty(0, 4), torch.empty(0, 4), [])) == []


def test_no_more_scores_are_held_at_a_time_than_stated_however_many_items_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "CELLS", 600)
    seen: list[int] = []
    monkeypatch.setattr(module, "rank_counts", lambda s, right: seen.append(s.numel()) or scores.rank_counts(s, right))
    rows = random_rows(400)
    retrieval(made(rows, rows, [f"caption {i % 3}" for i in range(400)]))
    assert max(seen) <= 600
    assert sum(seen) == 2 * 400 * 3


def test_all_captions_of_an_item_are_right_and_count_as_texts():
    axes = torch.eye(6)
    vectors = {
        "a cat": axes[0],
        "A  cat": axes[0],
        "feline": axes[4],
        "a dog": axes[1],
        "hound": axes[0],
        "bird": axes[2],
    }
    others = [("feline", "A  cat"), ("hound",), ()]
    asked: list[str] = []

    def texts(sentences):
        asked.extend(sentences)
        return torch.stack([vectors[sentence] for sentence in sentences])

    vision = torch.stack([axes[4], axes[1], axes[2]])
    found = replace(made(vision, torch.stack([axes[0], axes[1], axes[2]]), ["a cat", "a dog", "bird"]), others=others)
    found = replace(found, caption_ids=[caption_id(caption) for caption in found.captions])
    figures = {(figure.task, figure.measure): figure for figure in retrieval(found, texts)}
    assert asked == ["feline", "hound"], "equal captions are one"
    to_text, to_image = figures["image to text", "R@1"], figures["text to image", "R@1"]
    assert (to_text.n, to_text.candidates, to_image.n, to_image.candidates) == (3, 5, 5, 3)
    assert to_text.value == 1.0, "one of an item's captions is enough"
    assert to_text.chance == pytest.approx((2 / 5 + 2 / 5 + 1 / 5) / 3)
    assert to_image.value == pytest.approx((1 / 3 + 1 + 1 + 1 / 3 + 1) / 5), "a cat and hound lie at no image"
