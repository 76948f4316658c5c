"""Each format of data sets: it is detected and packed with all texts; options that do not fit are errors."""

import json
import re

import pytest

from tests.support import datasets
from tests.support.datasets import image, images, lines, write, write_tar
from tests.support.packing import contents, pack, samples_of
from tests.unit.data.importing.listing import listed, texts_of
from univitar_ds.data.importing.recognise import FORMATS, format_of
from univitar_ds.errors import DataError

CAPTIONS = [(f"caption {index}",) for index in range(3)]
SETS = {
    "webdataset": (datasets.webdataset, CAPTIONS, ["0", "1", "2"], ["train"] * 3),
    "img2dataset": (lambda folder: datasets.img2dataset(folder, tars=True), CAPTIONS, [None] * 3, ["train"] * 3),
    "img2dataset-files": (
        lambda folder: datasets.img2dataset(folder, tars=False),
        CAPTIONS,
        [None] * 3,
        ["train"] * 3,
    ),
    "classes": (datasets.class_folders, [()] * 3, ["cat", "dog", "cat"], ["train", "train", "val"]),
    "classes-videos": (datasets.class_videos, [()] * 3, ["run", "run", "jump"], ["train"] * 3),
    "tables": (datasets.parquet_parts, [()] * 3, ["cat", "dog", "cat"], ["train", "train", "test"]),
    "imagefolder": (datasets.imagefolder, CAPTIONS, [None] * 3, ["train", "train", "test"]),
    "coco": (
        datasets.coco,
        [(f"caption {index}", f"caption {index + 3}") for index in range(3)],
        [None] * 3,
        ["val"] * 3,
    ),
    "folder_table": (
        lambda folder: datasets.table(folder, "tsv").parent,
        [*CAPTIONS[:2], ()],
        [None, None, "run"],
        ["train"] * 3,
    ),
    "folder": (datasets.labelled, [()] * 3, ["class 0", "class 1", "class 2"], ["train"] * 3),
}
for form in ("csv", "tsv", "jsonl", "json", "parquet"):
    SETS[f"table-{form}"] = (
        lambda folder, form=form: datasets.table(folder, form),
        [*CAPTIONS[:2], ()],
        [None, None, "run"],
        ["train"] * 3,
    )


@pytest.mark.parametrize("name", SETS)
def test_a_form_is_recognised_and_packed_with_its_texts(tmp_path, name):
    make, captions, labels, splits = SETS[name]
    source = make(tmp_path / "source")
    assert format_of(str(source)) == name.partition("-")[0]
    manifest = pack(source, tmp_path / "out")
    assert manifest["skipped"] == []
    samples = samples_of(tmp_path / "out", manifest)
    found = sorted((sample for sample in samples.values()), key=lambda one: json.loads(one["json"])["file"][-6:])
    texts = [json.loads(sample["json"]) for sample in found]
    assert [tuple(text["captions"]) for text in texts] == captions
    assert [text["label"] for text in texts] == labels
    assert [sample["shard"].partition("-")[0] for sample in found] == splits
    for index, (sample, text) in enumerate(zip(found, texts, strict=True)):
        if text["kind"] == "image":
            assert sample["jpg"] == image(index)
        else:
            assert "mp4" in sample
    again = contents(tmp_path / "out")
    assert pack(source, tmp_path / "out") == manifest
    assert contents(tmp_path / "out") == again


def test_a_folder_with_two_tables_is_not_guessed(tmp_path):
    source = datasets.table(tmp_path, "csv").parent
    write(source, {"more.tsv": "file\tcaption\n"})
    assert format_of(str(source)) is None
    with pytest.raises(DataError, match=r"not exactly one of \*\.csv, \*\.tsv, \*\.jsonl; name the table"):
        listed(source, format="folder_table")


def test_every_format_has_a_form_of_data_set_here():
    assert {name.partition("-")[0] for name in SETS} | {name.partition("-")[2] for name in SETS} >= FORMATS.keys()


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("pipe:curl http://x/0.tar", "cannot be used"),
        ("gs://bucket/x", "copy the shards to a disk"),
        ("hf://datasets/x", "download the data set first"),
        ("https://x/0.tar", "download the shards first"),
        ("s3://", "names no bucket; write s3://BUCKET/PREFIX"),
    ],
)
def test_an_address_is_refused_with_a_remedy(tmp_path, address, remedy):
    with pytest.raises(DataError, match=re.escape(address.split()[0]) + ".*" + remedy):
        pack(address, tmp_path / "out")


def test_a_packed_folder_is_not_packed_again(tmp_path):
    source = datasets.labelled(tmp_path / "source")
    pack(source, tmp_path / "out")
    with pytest.raises(DataError, match="is packed already"):
        listed(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "zip"}, "zip: there is no such format; give one of .*coco"),
        ({"split": "../x"}, "--split '../x' is not a name"),
        ({"image_key": "x"}, "class folders, which does not use --image-key"),
        ({"captions": "lines"}, "does not use --captions lines"),
    ],
)
def test_options_that_a_form_does_not_use_are_refused(tmp_path, options, message):
    source = datasets.class_folders(tmp_path)
    with pytest.raises(DataError, match=message):
        listed(source, **options)


def test_an_extracted_archive_does_not_hide_the_class_folders_beside_it(tmp_path):
    source = datasets.class_folders(tmp_path)
    write_tar(source / "download.tar", [("a/b.jpg", image())])
    assert format_of(str(source)) == "classes"


def test_the_split_of_rows_that_name_none_can_be_given(tmp_path):
    source = datasets.webdataset(tmp_path)
    assert {row.split for row in listed(source, split="val").rows} == {"val"}


def test_captions_beside_the_files_come_before_other_files_of_a_folder(tmp_path):
    """A folder that earlier versions packed gives the same shards."""
    write(tmp_path, images(1, "a/") | {"a/0.txt": "own"})
    others = {
        "metadata.csv": "file_name,text\na/0.jpg,x\n",
        "annotations/captions_val.json": "{}",
        "00000_stats.json": "{}",
        "a/0.json": '{"caption": "x"}',
        "b/0.jpg": image(),
    }
    write(tmp_path, others)
    write_tar(tmp_path / "0.tar", [("a.jpg", image()), ("a.txt", "x")])
    assert texts_of(listed(tmp_path)) == {"a/0.jpg": ("own",)}
    write(tmp_path, {"metadata.jsonl": lines({"file": "a/0.jpg", "caption": "first"})})
    assert texts_of(listed(tmp_path)) == {"a/0.jpg": ("first",)}


def test_an_image_of_img2dataset_without_a_caption_takes_the_texts_of_its_json(tmp_path):
    files = images(3) | {
        "00000_stats.json": "{}",
        "0.json": '{"caption": null, "label": "cat"}',
        "1.json": "{",
        "2.txt": "x",
    }
    found = listed(write(tmp_path, files))
    assert texts_of(found) == {"0.jpg": "cat", "2.jpg": ("x",)}
    assert found.left_out["1.jpg"].startswith("bad_json")
