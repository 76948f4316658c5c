"""kNN and the linear probe, compared with plain formulas and scikit-learn, and at chance on random features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from univitar_ds.errors import ConfigError, DataError
from univitar_ds.evaluation import scores
from univitar_ds.evaluation.scores import bootstrap_interval
from univitar_ds.tasks.knn import TEMPERATURE, class_votes, knn
from univitar_ds.tasks.labelled import Features, Labelled, labelled
from univitar_ds.tasks.linear import linear
from univitar_ds.tasks.templates import read_templates


def random_data(rows: int = 240, classes: int = 4, signal: float = 0.0, seed: int = 0) -> Labelled:
    """Normal features, moved by `signal` along an axis of the class."""
    draws = torch.Generator().manual_seed(seed)
    truth = torch.arange(2 * rows) % classes
    features = torch.randn(2 * rows, 16, generator=draws) + signal * F.one_hot(truth, 16)
    names = [f"class {index}" for index in range(classes)]
    return Labelled(features[:rows], truth[:rows], features[rows:], truth[rows:], names)


@pytest.mark.parametrize("neighbours", [1, 7])
def test_votes_are_weighted_by_the_cosine_as_in_dino(neighbours):
    data = random_data(signal=1.0)
    cosines = F.cosine_similarity(data.test.double()[:, None], data.train.double()[None], dim=-1)
    near = cosines.topk(neighbours, dim=1)
    weights = torch.zeros(len(data.test), len(data.classes), dtype=torch.float64)
    weights.scatter_add_(1, data.train_classes[near.indices], (near.values / TEMPERATURE).exp())
    assert (class_votes(data, neighbours) - weights / weights.sum(1, keepdim=True)).abs().max() < 1e-9


def test_classes_of_one_item_are_no_warning(recwarn: pytest.WarningsRecorder):
    data = Labelled(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert class_votes(data, 1).argmax(1).tolist() == [0, 1, 2]
    assert not recwarn


def test_more_neighbours_than_items_are_all_items():
    data = random_data(rows=8)
    assert {figure.task for figure in knn(data, "image")} == {"kNN, k = 8"}


def test_the_linear_probe_is_logistic_regression_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = random_data(signal=1.5)
    figures, notes = linear(data, "image", progress=False)
    strength = float(notes[0].split("C = ")[1].split()[0])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    model.fit(data.train.double().numpy(), data.train_classes.numpy())
    wanted = model.score(data.test.double().numpy(), data.test_classes.numpy())
    assert figures[0].value == pytest.approx(wanted)
    assert figures[0].value > 0.6


def test_with_one_item_a_class_no_strength_is_chosen():
    data = Labelled(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert linear(data, "image", progress=False)[1] == [
        "Linear probe of images: C = 1, since no item is held out to choose it."
    ]


def test_random_features_are_at_chance():
    """The interval of the result holds the chance level: nothing of the test items reaches the probe."""
    data = random_data(rows=600)
    for figure in (linear(data, "image", progress=False)[0][0], knn(data, "image", [20])[0]):
        low, high = figure.interval
        assert low - 0.03 < figure.chance < high + 0.03
        assert figure.chance == 0.25


def test_the_strength_does_not_depend_on_the_test_items():
    data, other = random_data(signal=1.0), random_data(signal=1.0, seed=1)
    swapped = Labelled(data.train, data.train_classes, other.test, other.test_classes, data.classes)
    assert linear(data, "image", progress=False)[1] == linear(swapped, "image", progress=False)[1]


def test_labels_that_the_training_split_lacks_are_counted_and_left_out():
    train = Features(torch.eye(4), ["a", "b", "a", "b"])
    both = labelled(train, Features(torch.eye(3, 4), ["b", "z", "a"]), "image")
    assert (both.classes, both.unknown, both.test_classes.tolist()) == (["a", "b"], 1, [1, 0])
    assert torch.equal(both.test, torch.eye(3, 4)[[0, 2]])


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [(["a", "a"], ["a"], "only the label 'a'"), ([], ["a"], "no label"), (["a", "b"], ["z"], "--split")],
)
def test_data_that_no_probe_can_use_is_refused(train, test, said):
    with pytest.raises(DataError, match=said):
        labelled(Features(torch.zeros(len(train), 2), train), Features(torch.zeros(len(test), 2), test), "image")


def test_an_interval_is_that_of_the_mean():
    """Against the normal interval of a share, whose half width is 1.96 sqrt(p (1 - p) / n)."""
    hits = (torch.arange(1000) % 4 == 0).double()
    low, high = bootstrap_interval(hits)
    half = 1.96 * (0.25 * 0.75 / 1000) ** 0.5
    assert abs(low - (0.25 - half)) < 0.15 * half
    assert abs(high - (0.25 + half)) < 0.15 * half
    assert bootstrap_interval(hits) == (low, high)
    assert bootstrap_interval(torch.ones(5)) == (1.0, 1.0)


@pytest.mark.parametrize("n", [1, 2, 301])
def test_an_interval_is_that_of_a_plain_loop_of_resamples(n, monkeypatch):
    """Its figures do not depend on how many resamples are drawn at a time."""
    hits, classes = torch.rand(n, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 7
    draws, values, means, of_classes = np.random.default_rng(0), hits.double().numpy(), [], []
    for _ in range(scores.RESAMPLES):
        rows = draws.integers(n, size=n)
        means.append(values[rows].mean())
        found = [values[rows[classes.numpy()[rows] == one]] for one in range(7)]
        of_classes.append(np.mean([one.mean() for one in found if len(one)]))
    for at_once in (scores.DRAWN_ROWS, 1000):
        monkeypatch.setattr(scores, "DRAWN_ROWS", at_once)
        assert bootstrap_interval(hits) == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-12)
        assert bootstrap_interval(hits, classes) == pytest.approx(np.percentile(of_classes, [2.5, 97.5]), rel=1e-12)


def test_an_interval_of_a_mean_of_classes_weighs_classes_equally():
    hits, classes = torch.cat([torch.ones(990), torch.zeros(10)]), torch.tensor([0] * 990 + [1] * 10)
    low, high = bootstrap_interval(hits, classes)
    assert (low, high) == (0.5, 0.5)


def test_the_templates_of_clip_are_80_sentences():
    templates = read_templates("imagenet")
    assert (len(templates), len(set(templates))) == (80, 80)
    assert (templates[0], templates[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("a photo\n", r"'a photo' has no \{\}")])
def test_templates_that_cannot_be_used_are_refused(tmp_path, text, said):
    (tmp_path / "t").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_templates(str(tmp_path / "t"))
