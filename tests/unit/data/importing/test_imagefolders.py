"""The imagefolder format: splits and metadata."""

import pytest

from tests.support.datasets import image, images, lines, write
from tests.unit.data.importing.listing import listed, texts_of
from univitar_ds.data.importing.recognise import format_of
from univitar_ds.errors import DataError


def test_a_path_that_begins_with_a_split_belongs_to_it(tmp_path):
    rows = [{"file_name": f"{folder}/0.jpg", "caption": "x"} for folder in ("validation", "other")]
    write(tmp_path, {row["file_name"]: image() for row in rows} | {"metadata.jsonl": lines(*rows)})
    assert format_of(str(tmp_path)) == "imagefolder"
    assert {row.file: row.split for row in listed(tmp_path).rows} == {
        "validation/0.jpg": "validation",
        "other/0.jpg": "train",
    }


def test_an_imagefolder_without_its_column_or_with_two_metadata_is_refused(tmp_path):
    write(tmp_path, {"metadata.csv": "name,text\na.jpg,x\n"})
    with pytest.raises(DataError, match=r"'file_name': there is no such column; .*columns name, text"):
        listed(tmp_path)
    write(tmp_path, {"metadata.parquet": b""})
    with pytest.raises(DataError, match=r"metadata\.csv and other metadata"):
        listed(tmp_path)


def test_a_link_to_a_folder_above_hides_no_class_folders(tmp_path):
    source = write(tmp_path / "source", {"a/0.jpg": image(), "b/1.jpg": image(1)})
    write(tmp_path, {"metadata.csv": "file_name,text\n", "metadata.jsonl": ""})
    (source / "loop").symlink_to("..")
    assert format_of(str(source)) == "classes"


def test_metadata_in_folders_of_splits_is_found(tmp_path):
    write(tmp_path, {"x/y/metadata.csv": "file_name,text\n0.jpg,deep\n", "x/y/0.jpg": image()})
    assert texts_of(listed(tmp_path)) == {"x/y/0.jpg": ("deep",)}
    write(tmp_path, {"x/metadata.csv": "file_name,text\ny/0.jpg,higher\n"})
    assert texts_of(listed(tmp_path)) == {"x/y/0.jpg": ("higher",)}


def test_a_metadata_with_both_names_of_files_is_in_our_own_form(tmp_path):
    row = {"file": "0.jpg", "file_name": "original.jpg", "caption": "x"}
    write(tmp_path, images() | {"metadata.jsonl": lines(row)})
    assert format_of(str(tmp_path)) == "folder"
    assert texts_of(listed(tmp_path)) == {"0.jpg": ("x",)}
