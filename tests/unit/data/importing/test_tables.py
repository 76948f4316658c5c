"""Tables of media: rows, columns, paths and encodings."""

import re

import pytest

from tests.support.datasets import image, images, lines, write
from tests.unit.data.importing.listing import listed, texts_of
from univitar_ds.errors import DataError


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
