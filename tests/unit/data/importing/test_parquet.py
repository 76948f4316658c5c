"""Parquet tables that hold images themselves: packed row group by row group, with every fault of a cell counted."""

import json
import os

import pytest

from tests.support import datasets
from tests.support.datasets import embedded, image, parquet, write
from tests.support.packing import contents, pack, samples_of
from tests.support.runs import small_config
from univitar_ds.data.importing.parquet import media
from univitar_ds.data.importing.recognise import format_of, read_source
from univitar_ds.data.importing.rows import Cell, ReadOptions, table_stamp
from univitar_ds.data.importing.tables import split_of_part
from univitar_ds.data.tools.survey import survey
from univitar_ds.data.writing import extract, writer
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import DataError, SampleError

NAMES = ["cat", "dog"]


def cell(index: int, **fields) -> dict:
    return {"image": {"bytes": image(index), "path": f"a/{index}.jpg"}, "label": index % 2, **fields}


def listed(source, **options):
    return read_source(source, ReadOptions(**options))


def reasons(manifest) -> dict[str, str]:
    return {one["file"].removeprefix("t.parquet"): one["reason"] for one in manifest["skipped"]}


def test_faulty_cells_are_left_out_with_their_reason_and_the_others_are_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "MOST_BYTES", 50_000)
    (tmp_path / "secret.jpg").write_bytes(image())
    write(tmp_path / "source", {"beside.jpg": image(7)})
    rows = [
        cell(0),
        cell(0, image=None),
        cell(0, image={"bytes": b"", "path": "x.jpg"}),
        cell(0, image={"bytes": None, "path": None}),
        cell(0, image={"bytes": None, "path": "../secret.jpg"}),
        cell(0, image={"bytes": b"no image", "path": "../../etc/x.jpg"}),
        cell(0, image={"bytes": bytes(60_000), "path": "large.jpg"}),
        cell(1, label=2),
        cell(1, label=-1),
        cell(1, image={"bytes": None, "path": "beside.jpg"}),
        cell(2, image={"bytes": image(2), "path": None}),
    ]
    source = embedded(tmp_path / "source/t.parquet", rows, NAMES)
    manifest = pack(source, tmp_path / "out")
    found = reasons(manifest)
    assert found.pop("/4/secret.jpg").startswith(
        "no_media: column image has a path but no bytes: file '../secret.jpg' is"
    )
    assert found == {
        "/1": "no_media: column image is null in this row",
        "/2/x.jpg": "no_media: column image has no byte in this row",
        "/3": "no_media: column image is null in this row",
        "/5/x.jpg": "unreadable: the bytes are not an image in a supported format",
        "/6/large.jpg": "too_large: the file has 60000 bytes (limit 50000)",
        ", row 7": "label 2 has no name; the table names 2 classes",
        ", row 8": "no_caption: it has neither a caption nor a label",
    }
    samples = samples_of(tmp_path / "out", manifest)
    assert {name: sample["jpg"] for name, sample in samples.items()} == {
        "t.parquet/0/0.jpg": image(0),
        "t.parquet/9/beside.jpg": image(7),
        "t.parquet/10": image(2),
    }
    assert {json.loads(sample["json"])["label"] for sample in samples.values()} == {"cat", "dog"}
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".pack.jsonl",
        ".pack.lock",
        "manifest.json",
        "train-image-000000.tar",
    ]
    read = []

    def recorded(cells, *given):
        read.extend(cell.row for cell in cells)
        return media.read_cells(cells, *given)

    monkeypatch.setattr(extract, "read_cells", recorded)
    again = contents(tmp_path / "out")
    assert pack(source, tmp_path / "out") == manifest
    assert read == [4, 9]  # files that the table names; other rows are known
    assert contents(tmp_path / "out") == again


def test_an_interrupted_packing_continues_with_the_media_that_it_has_extracted(tmp_path, monkeypatch):
    source = embedded(tmp_path / "t.parquet", [cell(index) for index in range(5)], NAMES)
    whole = pack(source, tmp_path / "whole")

    def fails(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_shard", fails)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out")
    assert (tmp_path / "out/.pack.media").stat().st_size == sum(len(image(index)) for index in range(5))
    with monkeypatch.context() as patched:
        patched.setattr(extract, "read_cells", None)
        assert pack(source, tmp_path / "out") == whole
    assert not (tmp_path / "out/.pack.media").exists()
    shard = next((tmp_path / "out").glob("*.tar"))
    before = shard.read_bytes()
    shard.unlink()  # its files are known but no longer extracted
    assert pack(source, tmp_path / "out") == whole
    assert shard.read_bytes() == before


def test_a_row_group_that_cannot_be_decoded_costs_its_rows(tmp_path):
    source = embedded(tmp_path / "t.parquet", [cell(index) for index in range(6)], NAMES)
    from pyarrow.parquet import ParquetFile

    column = ParquetFile(source).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    with source.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\xff" * 64)
    found = reasons(pack(source, tmp_path / "out"))
    assert sorted(found) == ["/2/2.jpg", "/3/3.jpg"]
    for reason in found.values():
        assert reason.startswith("corrupt: row group 1 of its table cannot be read from row 2 on")


def test_a_truncated_table_and_a_row_group_that_is_too_large_are_refused(tmp_path, monkeypatch):
    source = embedded(tmp_path / "t.parquet", [cell(0)], NAMES)
    monkeypatch.setattr(media, "_MOST_GROUP_BYTES", 100)
    with pytest.raises(DataError, match=r"'image' has \d+ bytes in row group 0 \(limit 100\).*smaller row groups"):
        pack(source, tmp_path / "out")
    os.truncate(source, source.stat().st_size - 9)
    with pytest.raises(DataError, match="is not a Parquet file that can be read"):
        listed(source)


def test_the_column_of_media_is_found_or_named(tmp_path):
    source = parquet(
        tmp_path / "t.parquet", [{"thumbnail": image(1), "jpg": image(0), "caption": "x", "file": "0.jpg"}]
    )
    assert listed(source, image_key="jpg").rows[0].part == Cell(
        str(source), "jpg", 0, table_stamp(source), str(tmp_path)
    )
    assert listed(source, image_key="thumbnail").rows[0].file == "t.parquet/0"
    with pytest.raises(DataError, match=r"nothing to pack.*file '0\.jpg' is missing"):
        listed(source)  # a column of bytes may be anything, so paths have precedence
    assert [
        one[1]
        for one in media.read_cells(
            [Cell(str(source), "jpg", 0, table_stamp(source), str(tmp_path))], tmp_path, 1 << 20
        )
    ] == [image(0)]

    files = [{"bytes": image(0), "path": "0.jpg"}]
    parquet(source, [{"images": files, "left": files[0], "right": files[0], "caption": "x"}])
    with pytest.raises(DataError, match="left and right hold files; name the one with images"):
        listed(source)
    assert listed(source, image_key="right").rows[0].part.column == "right"
    with pytest.raises(DataError, match="column images holds bytes inside another type, such as a list; a row must"):
        listed(source, image_key="images")


def test_a_large_cell_is_not_read_with_the_texts(tmp_path):
    source = embedded(tmp_path / "t.parquet", [cell(0)], NAMES)
    from pyarrow.parquet import ParquetFile

    column = ParquetFile(source).metadata.row_group(0).column(0)
    with source.open("r+b") as stream:
        stream.seek(column.dictionary_page_offset or column.data_page_offset)
        stream.write(bytes(64))
    assert [row.label for row in listed(source).rows] == ["cat"]
    ((_, found),) = media.read_cells(
        [Cell(str(source), "image", 0, table_stamp(source), str(tmp_path))], tmp_path, 1 << 20
    )
    assert isinstance(found, SampleError)


def test_a_text_that_is_not_utf8_costs_its_row(tmp_path):
    import pyarrow
    from pyarrow import parquet as files

    texts = pyarrow.array([b"good", b"\xff\xfe"]).view(pyarrow.string())
    table = pyarrow.table({"image": [image(0), image(1)], "caption": texts})
    files.write_table(table, tmp_path / "t.parquet")
    found = listed(tmp_path / "t.parquet")
    assert [row.captions for row in found.rows] == [("good",)]
    assert list(found.left_out) == ["t.parquet, row 1"]


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"{", "1"),
        (b"[]", "1"),
        (b'{"info": {"features": [3]}}', "1"),
        (b"[" * 100_000, "1"),
        (json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", 3]}}}}).encode(), "1"),
        (json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", " b "]}}}}).encode(), "b"),
    ],
)
def test_class_names_of_another_form_are_ignored_with_a_warning(tmp_path, content, label, caplog):
    import pyarrow
    from pyarrow import parquet as files

    table = pyarrow.table({"image": [image(0)], "label": [1]}).replace_schema_metadata({b"huggingface": content})
    files.write_table(table, tmp_path / "t.parquet")
    assert [row.label for row in listed(tmp_path / "t.parquet").rows] == [label]
    assert ("ignored" in caplog.text) == (label == "1")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("cifar10-train-00000-of-00001.parquet", "train"),
        ("test_0.parquet", "test"),
        ("validation.parquet", "validation"),
        ("default/Train/0000.parquet", "train"),
        ("test/train-00000-of-00001.parquet", "train"),
        ("latest.parquet", None),
        ("0000.parquet", None),
    ],
)
def test_the_split_of_a_table_is_in_its_name(name, split):
    assert split_of_part(name) == split


def test_a_run_and_a_survey_read_a_folder_of_tables(tmp_path):
    source = datasets.parquet_parts(tmp_path / "source")
    assert format_of(str(source)) == "tables"
    found = survey(str(source))
    assert (found.title, found.training, found.evaluation) == ("a folder of Parquet tables", "train", "test")
    assert found.counts == {"train": {"image": 2}, "test": {"image": 1}}
    assert sorted(one.width for one in found.media) == [60, 60]
    config = small_config(tmp_path, tmp_path / "runs", data={"sources": [{"path": str(source)}], "lanes": 1})
    packed = with_packed_sources(config).data.sources[0].path
    assert with_packed_sources(config, pack=False).data.sources[0].path == packed
    os.utime(source / "data/test-00000-of-00001.parquet", ns=(0, 0))
    assert with_packed_sources(config).data.sources[0].path != packed


def test_media_are_extracted_in_the_order_of_the_table(tmp_path, monkeypatch):
    """A row group is read once, however the samples are mixed in the shards."""
    source = embedded(tmp_path / "t.parquet", [cell(index) for index in range(8)], NAMES)
    groups = []
    monkeypatch.setattr(media, "_check_size", lambda path, file, group, column: groups.append(group))
    pack(source, tmp_path / "out", shard_mb=0.002)
    assert len(list((tmp_path / "out").glob("*.tar"))) > 1
    assert groups == [0, 1, 2, 3]


def test_files_that_a_table_names_are_read_again_when_they_come_or_change(tmp_path):
    """The size and time of the table do not cover them."""
    source = embedded(tmp_path / "t.parquet", [cell(0), cell(1, image={"bytes": None, "path": "1.jpg"})], NAMES)
    out = tmp_path / "out"
    assert list(reasons(pack(source, out))) == ["/1/1.jpg"]
    for index in (2, 3):
        write(tmp_path, {"1.jpg": image(index)})
        manifest = pack(source, out)
        assert not manifest["skipped"]
        assert samples_of(out, manifest)["t.parquet/1/1.jpg"]["jpg"] == image(index)
    write(tmp_path / "files", {"1.jpg": image(4)})
    manifest = pack(source, out, images=tmp_path / "files")
    assert samples_of(out, manifest)["t.parquet/1/1.jpg"]["jpg"] == image(4)


@pytest.mark.parametrize("when", ["listed", "opened"])
def test_a_table_that_changes_while_it_is_packed_is_refused(tmp_path, monkeypatch, when):
    """A row of the new table would get the caption of the old one."""
    source = embedded(tmp_path / "t.parquet", [cell(index, caption=f"of {index}") for index in range(4)], NAMES)

    def change(function):
        def changed(*given):
            result = function(*given)
            embedded(source, [cell(index, caption=f"of {index}") for index in (3, 2, 1, 0)], NAMES)
            os.utime(source, ns=(1, 1))
            return result

        return changed

    module, name = (writer, "read_source") if when == "listed" else (media, "_check_size")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, change(getattr(module, name)))
        with pytest.raises(DataError, match=r"t\.parquet changed while it was being read; try again"):
            pack(source, tmp_path / "out")
    for sample in samples_of(tmp_path / "out", pack(source, tmp_path / "out")).values():
        (caption,) = json.loads(sample["json"])["captions"]
        assert sample["jpg"] == image(int(caption.removeprefix("of ")))


def test_extracted_media_that_are_gone_are_extracted_again(tmp_path, monkeypatch):
    source = embedded(tmp_path / "t.parquet", [cell(index) for index in range(4)], NAMES)
    whole = pack(source, tmp_path / "whole")
    out = tmp_path / "out"

    def stopped(*given):
        yield from list(media.read_cells(*given))[:2]
        raise KeyboardInterrupt

    for patch in ((writer, "examine_all", None), (extract, "read_cells", stopped)):
        with monkeypatch.context() as patched:
            patched.setattr(*patch)
            with pytest.raises((TypeError, KeyboardInterrupt)):
                pack(source, out)
        (out / ".pack.media").unlink() if patch[0] is writer else None
    assert pack(source, out) == whole
    assert contents(out) == contents(tmp_path / "whole")


def test_columns_of_other_types_and_names_are_read_or_refused(tmp_path, caplog):
    import pyarrow
    from pyarrow import parquet as files

    path = tmp_path / "t.parquet"
    once = pyarrow.array([image(0), image(1)], pyarrow.binary())
    files.write_table(pyarrow.table({"image": once.dictionary_encode(), "caption": ["a", "b"]}), path)
    found = samples_of(tmp_path / "out", pack(path, tmp_path / "out"))
    assert [found[f"t.parquet/{index}"]["jpg"] for index in range(2)] == [image(0), image(1)]

    files.write_table(pyarrow.table([once, once, ["a", "b"]], names=["image", "image", "caption"]), path)
    with pytest.raises(DataError, match="has column 'image' twice; give each column its own name"):
        listed(path)

    about = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "cat "]}}
    about = {b"huggingface": json.dumps({"info": {"features": about}}).encode()}
    for name, labels in (("label", ["cat", "cat"]), ("other", None)):
        table = pyarrow.table({"image": once, name: [0.0, 1.0]}).replace_schema_metadata(about)
        files.write_table(table, path)
        if labels is None:  # the metadata name a column that the table does not have
            with pytest.raises(DataError, match="name the one with captions or labels"):
                listed(path)
        else:
            assert [row.label for row in listed(path).rows] == labels
            assert "classes 0 and 1 have the same name, 'cat'" in caplog.text


def test_images_in_the_metadata_of_an_image_folder_are_read(tmp_path):
    embedded(tmp_path / "in/metadata.parquet", [cell(0)], NAMES)
    manifest = pack(tmp_path / "in", tmp_path / "out", format="imagefolder", image_key="image")
    assert list(samples_of(tmp_path / "out", manifest)) == ["metadata.parquet/0/0.jpg"]
    assert [row.label for row in listed(tmp_path / "in", format="imagefolder", image_key="image").rows] == ["cat"]
