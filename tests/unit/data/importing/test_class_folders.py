"""Class folders: which folders are classes, and their names."""

import re

import pytest

from tests.support import datasets
from tests.support.datasets import image, write
from tests.unit.data.importing.listing import listed, texts_of
from univitar_ds.data.importing.recognise import format_of
from univitar_ds.errors import DataError


def test_class_folders_without_splits_may_have_folders_inside(tmp_path):
    source = write(tmp_path, {"test/a/0.jpg": image(), "cat/1.jpg": image(), "preview.jpg": image()})
    found = listed(source, format="classes")
    assert texts_of(found) == {"test/a/0.jpg": "test", "cat/1.jpg": "cat"}
    assert found.left_out == {"preview.jpg": "no_class: it is in no class folder; move it into one"}
    assert format_of(str(source)) is None


@pytest.mark.parametrize("files", [["cat/0.jpg"], ["cat/0.jpg", "dog/1.jpg", "stray.jpg"]])
def test_folders_that_may_be_classes_name_the_format(tmp_path, files):
    source = write(tmp_path, {file: image(index) for index, file in enumerate(files)})
    advised = f"univitar-ds data pack {source} OUT --format classes"
    with pytest.raises(DataError, match=rf"needs a metadata\.jsonl .* labels: {re.escape(advised)}, and name OUT"):
        listed(source)
    assert len(listed(source, format="classes").rows) == len(files) - ("stray.jpg" in files)


def test_splits_that_differ_in_case_are_one(tmp_path):
    source = write(tmp_path, {"Train/cat/0.jpg": image(), "train/dog/1.jpg": image(1)})
    assert {row.file: row.split for row in listed(source).rows} == {
        "Train/cat/0.jpg": "train",
        "train/dog/1.jpg": "train",
    }


@pytest.mark.parametrize(
    "names",
    [
        "cat tabby, tabby cat\ndog a dog\n",
        "cat\ttabby, tabby cat\ndog\ta dog\nbird\tx\n",
        '{"cat": "tabby, tabby cat", "dog": "a dog"}',
        '{"0": ["cat", "tabby, tabby cat"], "1": ["dog", "a dog"]}',
        "\ufeffcat,tabby, tabby cat\r\ndog,a dog",
    ],
)
def test_class_folders_get_the_names_of_a_file(tmp_path, names):
    source = datasets.class_folders(tmp_path / "source")
    write(tmp_path, {"names": names})
    found = listed(source, class_names=tmp_path / "names")
    assert {row.file: row.label for row in found.rows} == {
        "train/cat/0.jpg": "tabby, tabby cat",
        "train/dog/1.jpg": "a dog",
        "val/cat/2.jpg": "tabby, tabby cat",
    }


def test_numbered_class_folders_get_the_names_of_a_list(tmp_path):
    source = write(tmp_path / "source", {"0/a.jpg": image(), "1/b.jpg": image()})
    write(tmp_path, {"names": "cat\ndog\n"})
    assert {row.label for row in listed(source, class_names=tmp_path / "names").rows} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat\tx\n", "has no name for 1 of 2 class folders, such as 'dog'"),
        ("cat\n", "line 1 is 'cat', not a folder and its name"),
        ("cat\tx\ncat\ty\n", "line 2 names folder 'cat' again"),
        ('{"cat": 3}', "not a folder and its name"),
        ("{", "is not JSON"),
        (b"\xff\xfe\xff", "cannot be read as UTF-8"),
    ],
)
def test_faulty_names_of_class_folders_are_refused(tmp_path, names, message):
    source = datasets.class_folders(tmp_path / "source")
    write(tmp_path, {"names": names})
    with pytest.raises(DataError, match=message):
        listed(source, class_names=tmp_path / "names")


def test_class_folders_without_media_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image or video"):
        listed(write(tmp_path, {"a/x.md": ""}), format="classes")
