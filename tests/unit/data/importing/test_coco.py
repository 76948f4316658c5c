"""Documents of COCO: captions of images, and entries that are left out."""

import json
import re

import pytest

from tests.support import datasets
from tests.support.datasets import images, write
from tests.unit.data.importing.listing import listed
from univitar_ds.errors import DataError


def coco_document(source) -> dict:
    return json.loads(source.read_text())


def test_errors_of_coco_are_left_out(tmp_path):
    source = datasets.coco(tmp_path)
    document = coco_document(source)
    document["annotations"] += [{"image_id": 99, "caption": "x"}, {"image_id": 10, "caption": " "}, 3]
    document["images"] += [{"id": 50, "file_name": "0.jpg"}, {"id": 51, "file_name": "../x.jpg"}, {"file_name": "x"}]
    document["annotations"] += [{"image_id": 51, "caption": "x"}]
    source.write_text(json.dumps(document))
    found = listed(source)
    assert len(found.rows) == 3
    for where, message in {
        "annotation 6": "its image_id 99 is not the id of an image",
        "annotation 7": "the caption is empty",
        "annotation 8": "its image_id None is not the id of an image",
        "image 3": "no annotation has the image_id 50",
        "image 4": "file '../x.jpg' is outside of",
        "image 5": "not an object with an id",
    }.items():
        assert message in found.left_out.pop(f"captions_val2017.json, {where}")
    assert found.left_out == {}


def test_images_of_coco_with_one_id_are_left_out(tmp_path):
    source = datasets.coco(tmp_path)
    document = coco_document(source)
    document["images"][1]["id"] = document["images"][0]["id"]
    source.write_text(json.dumps(document))
    found = listed(source)
    assert [row.captions for row in found.rows] == [("caption 2", "caption 5")]
    for number in (0, 1):
        assert re.search("duplicate: 2 images have the id", found.left_out[f"captions_val2017.json, image {number}"])


def test_a_folder_of_coco_is_packed_with_a_split_for_each_json(tmp_path):
    source = datasets.coco(tmp_path)
    write(tmp_path, {"annotations/captions_train2017.json": source.read_bytes()} | images(3, "train2017/"))
    assert {row.file.partition("/")[0]: row.split for row in listed(tmp_path).rows} == {
        "val2017": "val",
        "train2017": "train",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("images"), "has no list of images, as COCO's captions have; it has info, annotations"),
        (lambda one: one.update(annotations=[{"bbox": 1}]), "its annotations have no caption but bbox"),
        (lambda one: one["images"][0].update(file_name="x.jpg") or one.update(images=one["images"][:1]), "--images"),
        (lambda one: one.update(images={}), "has no list of images, .*; it has a dict there"),
        (lambda one: one.update(images=[]), "its list of images is empty"),
        (lambda one: one.update(annotations=[]), "has nothing to pack"),
    ],
)
def test_a_json_that_is_no_coco_is_refused(tmp_path, change, message):
    source = datasets.coco(tmp_path)
    document = coco_document(source)
    change(document)
    source.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        listed(source)
