"""Each format of data sets: it is detected, packed with all texts, and its errors are named."""

import json
import re
import tarfile

import pytest

from tests.support import datasets, media
from tests.support.datasets import image, images, lines, write, write_tar
from tests.support.packing import contents, pack, samples_of
from univitar_ds.data.importing.recognise import FORMATS, format_of, read_source
from univitar_ds.data.importing.rows import ReadOptions
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


def listed(source, **options):
    return read_source(source, ReadOptions(**options))


def texts_of(listing):
    return {row.file: row.captions or row.label for row in listing.rows}


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


# Class folders


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


# Tables


def test_rows_of_one_file_are_joined_and_faulty_rows_left_out(tmp_path):
    source = write(tmp_path / "source", images())
    rows = (
        "file;text;label;split\n"
        '0.jpg;"one; quoted";;\n'
        "0.jpg;two;;\n"
        "0.jpg;two;;\n"
        "0.jpg;three;;val\n"
        "1.jpg;;7;val\n"
        "2.jpg;;;\n"
        "9.jpg;x;;\n"
        "../out.jpg;x;;\n"
        "/etc/passwd;x;;\n"
        "http://x/a.jpg;x;;\n"
        "2.jpg;x;;a/b\n"
        "2.jpg;x\n"
        ";x;;\n"
        '2.jpg;"bad"x;;\n'
        "2.jpg;last;;\n"
    )
    write(tmp_path, {"out.jpg": image(), "source/t.csv": "\ufeff" + rows})
    found = listed(source / "t.csv")
    assert texts_of(found) == {"0.jpg": ("one; quoted", "two"), "1.jpg": "7", "2.jpg": ("last",)}
    assert {row.split for row in found.rows} == {"train", "val"}
    for line, message in {
        4: "duplicate: file '0.jpg' with the same texts is in t.csv, line 2 too",
        5: "duplicate: file '0.jpg' has split 'train' in t.csv, line 2, 'val' here",
        7: "neither a caption nor a label",
        8: "file '9.jpg' is missing",
        9: "file '../out.jpg' is outside of .*--images FOLDER",
        10: "file '/etc/passwd' is outside of",
        11: "is an address; download the files first",
        12: "split 'a/b' is not a name",
        13: "2 fields, but the header has 4",
        14: "no file in file",
        15: "not CSV up to line 15",
    }.items():
        assert re.search(message, found.left_out.pop(f"t.csv, line {line}")), line
    assert found.left_out == {}


def test_paths_of_a_table_may_be_absolute_or_lead_up_inside_the_folder_of_the_images(tmp_path):
    write(tmp_path, images(3, "media/"))
    write(tmp_path, {"tables/a/t.tsv": f"path\tcaption\n{tmp_path}/media/0.jpg\ta\n../../media/1.jpg\tb\n2.jpg\tc\n"})
    found = listed(tmp_path / "tables/a/t.tsv", images=tmp_path / "media")
    assert texts_of(found) == {"0.jpg": ("a",), "1.jpg": ("b",), "2.jpg": ("c",)}
    assert found.root == tmp_path / "media"
    with pytest.raises(DataError, match=r"nothing to pack .3 left out, the first: .*is outside of"):
        listed(tmp_path / "tables/a/t.tsv")


def test_columns_are_named_by_options(tmp_path):
    source = write(
        tmp_path, images() | {"t.jsonl": lines({"pic": "0.jpg", "a": "x", "b": ["y", "x"], "c": 3, "d": "dev"})}
    )
    keys = {"image_key": "pic", "caption_keys": ("a", "b"), "label_key": "c", "split_key": "d"}
    (row,) = listed(source / "t.jsonl", **keys).rows
    assert (row.file, row.captions, row.label, row.split) == ("0.jpg", ("x", "y"), "3", "dev")
    for option, name in (("image_key", "--image-key"), ("label_key", "--label-key"), ("split_key", "--split-key")):
        with pytest.raises(DataError, match=f"{name} 'no': there is no such column; .*columns pic, a, b, c, d"):
            listed(source / "t.jsonl", **{**keys, option: "no"})
    with pytest.raises(DataError, match=r"--caption-key 'no': there is no such column; .*columns pic, a"):
        listed(source / "t.jsonl", **{**keys, "caption_keys": ("a", "no")})
    with pytest.raises(DataError, match=r"columns pic, a, b, c, d; name the one with images or videos.*--image-key"):
        listed(source / "t.jsonl")
    with pytest.raises(DataError, match="name the one with captions or labels: --caption-key"):
        listed(source / "t.jsonl", image_key="pic")


def test_a_field_of_csv_may_be_long_up_to_a_limit(tmp_path):
    limit = 1 << 20
    write(tmp_path, images() | {"t.csv": f"file,text\n0.jpg,{'x' * 400_000}\n1.jpg,{'x' * (limit + 1)}\n2.jpg,z\n"})
    found = listed(tmp_path / "t.csv")
    assert [row.file for row in found.rows] == ["0.jpg", "2.jpg"]
    assert re.search(rf"\({limit}\)\); .*shorten the field", found.left_out["t.csv, line 3"])


def test_a_link_in_a_folder_is_followed_and_a_path_out_of_it_is_not(tmp_path):
    write(tmp_path, {"blobs/0": image(), "set/t.csv": "file,text\n0.jpg,x\n../blobs/0,y\n"})
    (tmp_path / "set/0.jpg").symlink_to("../blobs/0")
    found = listed(tmp_path / "set/t.csv")
    assert texts_of(found) == {"0.jpg": ("x",)}
    assert "is outside of" in found.left_out["t.csv, line 3"]


def test_lines_that_are_no_json_are_left_out(tmp_path):
    deep = "[" * 100_000
    source = write(tmp_path, images() | {"t.jsonl": '{"file": "0.jpg", "caption": "x"}\n{\n3\n\n' + deep})
    found = listed(source / "t.jsonl")
    assert texts_of(found) == {"0.jpg": ("x",)}
    assert [reason[:7] for reason in found.left_out.values()] == ["not JSO", "not an ", "not JSO"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_tables_may_have_a_byte_order_mark(tmp_path, encoding):
    write(tmp_path, images())
    (tmp_path / "t.csv").write_bytes("file,caption\n0.jpg,größe 日本\n".encode(encoding))
    assert texts_of(listed(tmp_path / "t.csv")) == {"0.jpg": ("größe 日本",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty or has no header"),
        ("t.csv", b"file,file\n", "has column 'file' twice"),
        ("t.csv", b"file,caption\n", "has nothing to pack"),
        ("t.csv", "file,caption\n0.jpg,größe\n".encode("latin1"), "is not UTF-8 text .*iconv"),
        ("t.csv", b"file,caption\n" + b"x" * (17 << 20), "line 2 has 16777216 characters"),
        ("t.jsonl", b"", "has no row"),
        ("t.json", b"[{", "is not JSON"),
        ("t.json", b"[3]", "has no row"),
        ("t.parquet", b"PAR1", "is not a Parquet file that can be read"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    write(tmp_path, {name: content})
    with pytest.raises(DataError, match=message):
        listed(tmp_path / name)


def test_media_in_another_table_than_parquet_are_refused_with_a_remedy(tmp_path):
    write(tmp_path, {"t.jsonl": lines({"image": {"bytes": "x", "path": "a.jpg"}, "caption": "x"})})
    with pytest.raises(DataError, match="holds the media itself, not paths; export it"):
        listed(tmp_path / "t.jsonl")


def test_a_table_with_another_name_is_read_in_the_given_format(tmp_path):
    write(tmp_path, images() | {"captions.txt": "image,caption\n0.jpg,a\n"})
    assert texts_of(listed(tmp_path / "captions.txt", format="csv")) == {"0.jpg": ("a",)}


# Imagefolders


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


# COCO


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


# Tars


def test_hostile_members_of_tars_are_left_out_and_nothing_is_extracted(tmp_path):
    source = tmp_path / "source/0.tar"
    good = [("good.jpg", image()), ("good.txt", "fine")]
    bad = [
        *(("../../up.jpg", image(1)), ("../../up.txt", "up")),
        *(("/etc/abs.jpg", image(2)), ("/etc/abs.txt", "abs")),
        *(("two.jpg", image()), ("two.jpg", image()), ("two.txt", "x")),
        *(("none.txt", "x"), ("silent.jpg", image())),
    ]
    write_tar(source, good + bad)
    with tarfile.open(source, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    manifest = pack(str(tmp_path / "source/{0..0}.tar"), tmp_path / "out")
    files = sorted(samples_of(tmp_path / "out", manifest))
    assert files == ["0.tar/../../up.jpg", "0.tar//etc/abs.jpg", "0.tar/good.jpg"]
    reasons = {row["file"]: row["reason"].partition(":")[0] for row in manifest["skipped"]}
    assert reasons == {
        "0.tar/two": "duplicate",
        "0.tar/none": "no_media",
        "0.tar/silent": "no_caption",
        "0.tar/link": "link",
    }
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix == ".jpg") == []


def test_media_of_tars_that_cannot_be_decoded_and_damaged_parts_are_left_out(tmp_path):
    samples = [("a.jpg", image()[:-50]), ("a.txt", "x"), ("b.jpg", image(1)), ("b.txt", "y"), ("c.jpg", image(2))]
    path = write_tar(tmp_path / "0.tar", samples)
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"c.jpg") + 700])
    manifest = pack(path, tmp_path / "out")
    assert list(samples_of(tmp_path / "out", manifest)) == ["0.tar/b.jpg"]
    undecodable, cut = manifest["skipped"]
    assert (undecodable["file"], undecodable["reason"][:8]) == ("0.tar/a.jpg", "corrupt:")
    assert cut["reason"].startswith("cut: shard 0: cut off")


def test_a_tar_that_changes_while_it_is_packed_is_noticed(tmp_path, monkeypatch):
    from univitar_ds.data.writing import writer

    path = write_tar(tmp_path / "0.tar", [("a.png", media.encoded(media.noise(9, 9), "PNG")), ("a.txt", "x")])
    planned = writer._planned

    def and_spoil(*args):
        path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX"))
        return planned(*args)

    monkeypatch.setattr(writer, "_planned", and_spoil)
    with pytest.raises(DataError, match="changed while it was being packed"):
        pack(path, tmp_path / "out")


def test_a_key_that_occurs_again_in_a_tar_joins_nothing(tmp_path):
    members = [(f"{key}.{end}", content) for key in "0190" for end, content in (("jpg", image(int(key))), ("txt", key))]
    members[-2:] = [("0.jpg", image(5)), ("0.txt", "other")]
    found = listed(write_tar(tmp_path / "0.tar", members))
    assert texts_of(found) == {f"0.tar/{key}.jpg": (key,) for key in "019"}
    assert re.search("^duplicate: .*'0.tar/0.jpg'.* own key", found.left_out["0.tar/0"])


def test_a_large_json_in_a_tar_is_named_as_such(tmp_path):
    large = json.dumps({"caption": "x", "other": "y" * (1 << 20)})
    members = [("0.jpg", image()), ("0.json", large), ("1.jpg", image(1)), ("1.json", large), ("1.txt", "kept")]
    found = listed(write_tar(tmp_path / "0.tar", members))
    assert texts_of(found) == {"0.tar/1.jpg": ("kept",)}
    assert found.left_out["0.tar/0"].startswith(f"too_large: its .json has {len(large)} bytes (limit 1048576)")


def test_lines_of_texts_in_tars_are_captions_if_asked(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("a.jpg", image()), ("a.txt", "one\ntwo\n")])
    assert listed(path, captions="lines").rows[0].captions == ("one", "two")
    assert len(listed(path).rows[0].captions) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.tar", "is missing"), ("x{0..3}.tar", "is missing .4 of 4 are"), ("x.tar.gz", "is a compressed tar")],
)
def test_tars_that_are_not_there_are_refused(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        listed(tmp_path / name)


def test_an_empty_output_of_img2dataset_is_refused_with_a_remedy(tmp_path):
    write(tmp_path, {"00000_stats.json": "{}", "00000.parquet": b"PAR1"})
    with pytest.raises(DataError, match=r"--output_format webdataset or files"):
        listed(tmp_path)
