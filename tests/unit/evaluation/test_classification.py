"""Accuracy of a head, compared with a plain count for each set, and the number of items that were left out."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.support.finished import run_config, write_run
from tests.support.shards import write_demo_shards
from univitar_ds.classes import ClassList
from univitar_ds.errors import CheckpointError, DataError
from univitar_ds.evaluation import classification
from univitar_ds.evaluation.classification import measure_classes
from univitar_ds.evaluation.run import evaluate, evaluate_run
from univitar_ds.training.checkpoint.offline import open_trained

CLASSES = ClassList({"pets": [f"p{i}" for i in range(7)], "cars": ["c0", "c1"]})  # rows: cars 0 to 1, pets 2 to 8
MODEL = torch.nn.Linear(1, 1)


class Pack(SimpleNamespace):
    pixels = frames = grid_thw = torch.empty(0)

    def __len__(self):
        return len(self.sets)


@pytest.fixture
def measured(monkeypatch):
    """Figures and notes of packs whose logits are given."""

    def measure(packs, logits):
        rows = iter(logits)
        monkeypatch.setattr(classification, "class_logits", lambda *_: next(rows))
        rule = {"by where of pets (width > 9)": 3}
        made = [
            Pack(sets=sets, labels=labels, bad=bad or {}, filtered=rule if bad else {}) for sets, labels, bad in packs
        ]
        return measure_classes(MODEL, CLASSES, made, "image", progress=False)

    return measure


@pytest.mark.numeric
def test_an_item_competes_with_the_classes_of_its_set(measured):
    sets = ["pets"] * 6 + ["cars"] * 3
    labels = ["p0", "p1", "p2", "p2", "p6", "p6", "c0", "c1", "c1"]
    logits = torch.randn(9, 9, generator=torch.Generator().manual_seed(3))
    order = [0, 6, 1, 7, 2, 8, 3, 4, 5]  # the sets alternate, in two packs
    parts = [order[:4], order[4:]]
    figures, notes = measured(
        [([sets[i] for i in part], [labels[i] for i in part], None) for part in parts], [logits[part] for part in parts]
    )
    assert notes == []
    pets, cars = logits[:6, 2:], logits[6:, :2]
    truth = torch.tensor([0, 1, 2, 2, 6, 6])
    ranks = (pets > pets.gather(1, truth[:, None])).sum(dim=1)
    first = (ranks == 0).double()
    per_class = torch.stack([first[truth == label].mean() for label in (0, 1, 2, 6)]).mean()
    right = (cars.argmax(dim=1) == torch.tensor([0, 1, 1])).double()
    wanted = [
        ("cars", "top-1", right.mean(), 1 / 2, 3, 2),
        ("cars", "top-1, mean of classes", (right[0] + right[1:].mean()) / 2, 1 / 2, 3, 2),
        ("pets", "top-1", first.mean(), 1 / 7, 6, 7),
        ("pets", "top-5", (ranks < 5).double().mean(), 5 / 7, 6, 7),
        ("pets", "top-1, mean of classes", per_class, 1 / 7, 6, 7),
    ]
    assert [(one.set, one.measure, one.n, one.candidates) for one in figures] == [
        (name, measure, n, among) for name, measure, _, _, n, among in wanted
    ]
    for figure, (_, measure, value, chance, _, _) in zip(figures, wanted, strict=True):
        assert_sums_close(figure.value, value.item(), terms=9, what=measure)
        assert_sums_close(figure.chance, chance, terms=9, what=measure)


@pytest.mark.numeric
def test_equal_logits_give_exactly_the_level_of_chance(measured):
    figures, _ = measured([(["pets"] * 7, [f"p{i}" for i in range(7)], None)], [torch.zeros(7, 9)])
    for figure in figures:
        assert_sums_close(figure.value, figure.chance, terms=9)


def test_unknown_labels_and_bad_samples_are_counted_and_not_scored(measured):
    packs = [(["pets", "pets", "no"], ["p0", "unknown", "p0"], {"corrupt": 2}), (["cars"], [None], {})]
    figures, notes = measured(packs, [torch.eye(9)[[2, 3, 4]]])
    assert [(one.measure, one.value, one.n) for one in figures] == [
        ("top-1", 1.0, 1), ("top-5", 1.0, 1), ("top-1, mean of classes", 1.0, 1),
    ]  # fmt: skip
    said = "left out: 3 by where of pets (width > 9), 2 corrupt, 3 without a label that the run has learned; "
    assert len(notes) == 1
    assert said in notes[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shards = write_demo_shards(tmp_path_factory.mktemp("shards"), images=16, videos=8, shards=1)
    folder = tmp_path_factory.mktemp("runs") / "tried"
    return folder, write_run(folder, run_config(shards, objective={"kind": "classification"}))


def test_the_head_of_a_run_is_scored_on_its_evaluation_sources(run):
    folder, model = run
    trained = open_trained(folder)
    assert trained.classes.names == {None: ("blue", "green", "grey", "left", "red", "right")}
    assert all(torch.equal(a, b) for a, b in zip(trained.model.parameters(), model.parameters(), strict=True))
    found = evaluate(trained)["figures"]
    assert {(one["task"], one["modality"], one["n"]) for one in found} == {
        ("classification", "image", 4), ("classification", "video", 2),
    }  # fmt: skip
    assert "classification" in evaluate_run(folder, progress=False)
    assert not list(folder.glob("examples-*"))


def test_sources_without_known_labels_are_refused(run, tmp_path):
    (tmp_path / "names.json").write_text('{"sets": [{"set": "x", "classes": ["a", "b"]}]}')
    trained = open_trained(run[0])
    other = type(trained)(**{**vars(trained), "classes": ClassList.read(tmp_path / "names.json")})
    with pytest.raises(DataError, match=r"measured nothing: .* 4 without a label that the run has learned"):
        evaluate(other)


def test_a_list_of_other_classes_does_not_fit_the_head(run):
    folder = run[0]
    kept = (folder / "classes.json").read_text()
    try:
        ClassList({None: ["a", "b"]}).write(folder / "classes.json")
        with pytest.raises(CheckpointError, match=r"head\.weight"):
            open_trained(folder)
    finally:
        (folder / "classes.json").write_text(kept)
