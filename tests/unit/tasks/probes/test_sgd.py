"""The linear probe by SGD, compared with scikit-learn and a plain loop, and at chance on random features."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.unit.tasks.test_probes import random_data
from univitar_ds.tasks.labelled import Labelled
from univitar_ds.tasks.probes.sgd import linear_sgd
from univitar_ds.tasks.probes.sweep import Recipe, best_of, chosen, linear_heads, row_batches, train

CPU = torch.device("cpu")


def probed(data: Labelled, **how) -> tuple[list, list[str]]:
    return linear_sgd(data, "image", device=CPU, **how)


def trained(data: Labelled, rates: list[float], steps: int, batch: int) -> list[nn.Linear]:
    heads = linear_heads(len(rates), data.train.shape[1], len(data.classes), CPU)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([F.cross_entropy(head(data.train[rows]), data.train_classes[rows]) for head in heads])

    recipe = Recipe("sgd", tuple(rates), batch, 1, 1)
    batches = ([rows] for rows in row_batches(torch.arange(len(data.train)), batch))
    train(heads, rates, recipe, batches, loss, steps=steps, progress=None)
    return heads


def test_a_head_ends_where_logistic_regression_of_scikit_learn_does():
    from sklearn.linear_model import LogisticRegression

    data = random_data(signal=1.0)
    (head,) = trained(data, [1.0], 400, len(data.train))
    found = head(data.test).softmax(1).double().detach()
    model = LogisticRegression(C=1e6, tol=1e-8, max_iter=5000)
    model.fit(data.train.double().numpy(), data.train_classes.numpy())
    wanted = torch.from_numpy(model.predict_proba(data.test.double().numpy()))
    # The optimum has no closed form: both stop near it. Other heads, as after 40 steps, are 100 times as far away.
    assert (found - wanted).abs().max() < 1e-3


def test_heads_that_are_trained_together_are_those_that_are_trained_alone():
    data = random_data(signal=1.0)
    together = trained(data, [0.01, 0.3], 20, 32)
    for head, rate in zip(together, (0.01, 0.3), strict=True):
        (alone,) = trained(data, [rate], 20, 32)
        assert torch.equal(head.weight, alone.weight)


def test_a_head_is_that_of_a_plain_loop():
    data = random_data(signal=1.0)
    (head,) = trained(data, [0.1], 12, 32)
    (plain,) = linear_heads(1, 16, 4, CPU)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    draws = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(240, generator=draws) for _ in range(2)])
    first = [*order[:240].split(32), *order[240:].split(32)]
    for step, rows in enumerate(first[:12]):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * step / 12, dtype=torch.float64)).item())
        optimizer.zero_grad()
        F.cross_entropy(plain(data.train[rows]), data.train_classes[rows]).backward()
        optimizer.step()
    # The rates of torch's schedule follow by recursion: each differs by a few roundings of float64.
    assert (head.weight - plain.weight).abs().max() < 1e-6


def test_the_probe_learns_classes_on_any_scale_of_the_features():
    data = random_data(signal=2.0)
    scale, shift = torch.logspace(-4, 4, 16), torch.linspace(-100, 100, 16)
    moved = Labelled(
        data.train * scale + shift, data.train_classes, data.test * scale + shift, data.test_classes, data.classes
    )
    for one in (data, moved):
        figures, notes = probed(one, epochs=30)
        assert figures[0].value > 0.75
        assert "held out" in notes[0]


def test_random_features_are_at_chance():
    (figure, *_), _ = probed(random_data(rows=600), epochs=5)
    low, high = figure.interval
    assert low - 0.03 < figure.chance < high + 0.03
    assert figure.chance == 0.25


def test_the_rate_does_not_depend_on_the_test_items():
    data, other = random_data(signal=1.0), random_data(signal=1.0, seed=1)
    swapped = Labelled(data.train, data.train_classes, other.test, other.test_classes, data.classes)
    assert probed(data, epochs=3)[1] == probed(swapped, epochs=3)[1]


def test_a_rate_that_diverges_is_not_chosen():
    nan = float("nan")
    assert best_of([nan, 0.25, 0.5, 0.5, nan]) == 2
    place, said = chosen([0.1, 1.0, 10.0], [0.5, 0.7, nan], "top-1", "9 training items held out")
    assert (place, said) == (1, "learning rate 1 of 0.1 to 10, with top-1 70.0 % on 9 training items held out.")
    assert "one beyond may be better" in chosen([0.1, 1.0], [0.5, 0.7], "top-1", "9")[1]


def test_with_one_item_a_class_the_middle_rate_is_taken():
    data = Labelled(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ["a", "b", "c"])
    _, notes = probed(data, epochs=2)
    assert "learning rate 0.001, the middle one of 1e-05 to 0.1" in notes[0]
