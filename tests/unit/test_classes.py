"""The classes of a run: one range of indices for each data set."""

import pytest

from univitar_ds.classes import ClassList, class_list
from univitar_ds.errors import CheckpointError, DataError

PAIRS = [
    ("pets", "dog"),
    ("pets", "cat"),
    (None, "red"),
    ("cars", "red"),
    ("cars", "blue"),
    (None, "blue"),
    ("one", "x"),
]


def test_each_set_has_its_classes_in_a_range_of_its_own():
    classes = class_list(PAIRS + PAIRS[::-1])
    assert classes.names == {None: ("blue", "red"), "cars": ("blue", "red"), "pets": ("cat", "dog")}
    assert list(classes.names) == [None, "cars", "pets"]
    assert classes.spans == {None: (0, 2), "cars": (2, 4), "pets": (4, 6)}
    assert len(classes) == 6
    rows = [classes.row(*pair) for pair in [(None, "blue"), (None, "red"), ("cars", "blue"), ("pets", "dog")]]
    assert rows == [0, 1, 2, 5]
    assert [classes.row(*pair) for pair in [("one", "x"), ("pets", "red"), ("pets", None), ("no", "cat")]] == [None] * 4


def test_a_list_is_read_as_it_was_written(tmp_path):
    classes = ClassList({"größe": ["klein", "groß"], None: ["b", "a"]})
    classes.write(tmp_path / "classes.json")
    assert ClassList.read(tmp_path / "classes.json").names == {None: ("b", "a"), "größe": ("klein", "groß")}


@pytest.mark.parametrize(("pairs", "said"), [([], "have: none"), ([("a", "x"), ("b", "y")], "have: x, y")])
def test_labels_without_a_choice_are_refused(pairs, said):
    with pytest.raises(DataError, match=f"at least 2 labels, the sources {said}"):
        class_list(pairs)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"sets": [{"set": "a"}]}', "[]"])
def test_a_missing_or_damaged_list_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "classes.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"classes\.json cannot be read as the classes of a run"):
        ClassList.read(tmp_path / "classes.json")
