"""The survey of a source: its format, splits, kinds, sizes and texts."""

import time

import pytest

from tests.support.datasets import image, write, write_tar
from tests.support.s3 import s3_server
from tests.unit.drafting import made
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.tools import survey as module
from univitar_ds.data.tools.survey import survey, training_split
from univitar_ds.data.writing.writer import PackOptions, pack_folder
from univitar_ds.errors import DataError


def test_a_folder_and_its_packed_shards_have_equal_surveys(tmp_path):
    made.table(tmp_path / "here")
    pack_folder(tmp_path / "here/t.csv", tmp_path / "packed", PackOptions(workers=1))
    files, shards = survey(str(tmp_path / "here/t.csv")), survey(str(tmp_path / "packed"))
    assert files.counts == shards.counts == {"train": {"image": 18}, "test": {"image": 6}}
    assert (files.training, files.evaluation) == (shards.training, shards.evaluation) == ("train", "test")
    assert sorted(size.width for size in files.media) == sorted(size.width for size in shards.media)
    assert {one.captions for one in files.texts} == {one.captions for one in shards.texts}
    assert files.exact
    assert shards.exact
    assert (files.packed, shards.packed) == (False, True)


def test_tars_at_s3_are_read_where_they_are(tmp_path):
    folder = made.tars(tmp_path / "tars")
    with s3_server() as server:
        found = survey(server.upload(folder, "some/tars"), StorageSettings(endpoint_url=server.url))
    assert found.counts == {None: {"video": 8, "image": 16}}
    assert {size.kind for size in found.media} == {"image", "video"}
    assert len(found.texts) == 24
    assert found.exact


def test_the_number_of_samples_of_a_partly_scanned_tar_is_estimated(tmp_path, monkeypatch):
    write_tar(
        tmp_path / "a.tar", [(f"{i}.{end}", text) for i in range(60) for end, text in (("jpg", image()), ("txt", "a"))]
    )
    monkeypatch.setattr(module, "SCANNED", 20)
    found = survey(str(tmp_path / "a.tar"))
    assert not found.exact
    assert 50 <= found.counts[None]["image"] <= 70


def test_the_texts_of_the_first_samples_of_a_tar_are_read(tmp_path, monkeypatch):
    members = [(f"{i}.{end}", text) for i in range(8) for end, text in (("jpg", image()), ("txt", f"a text {i}"))]
    write_tar(tmp_path / "a.tar", members)
    monkeypatch.setattr(module, "SHARD_TEXTS", 5)
    found = survey(str(tmp_path / "a.tar"))
    assert [one.captions for one in found.texts] == [(f"a text {i}",) for i in range(5)]
    assert len(found.numbers["image"]) == 8


def test_damaged_files_are_left_out_of_the_sizes(tmp_path):
    folder = made.sidecars(tmp_path / "here", 8)
    (folder / "0.jpg").write_bytes(b"no image")
    found = survey(str(folder))
    assert found.counts == {"train": {"image": 8}}
    assert len(found.media) == 7


def test_files_of_which_none_can_be_read_are_an_error_and_a_part_of_them_a_warning(tmp_path, caplog):
    write(tmp_path, {"cats/0.jpg": b"", "dogs/0.jpg": b"nothing"})
    with pytest.raises(DataError, match=r"2 of 2 media files .* cannot be read, the first: 0\.jpg: unreadable"):
        survey(str(tmp_path))
    write(tmp_path, {"cats/1.jpg": image()})
    assert len(survey(str(tmp_path)).media) == 1
    assert "2 of 3 media files that were looked at cannot be read, and such files are left out" in caplog.text


def test_a_listing_that_takes_too_long_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    folder = made.sidecars(tmp_path / "here", 2)
    monkeypatch.setattr(module, "LISTING_S", 0.0)
    monkeypatch.setattr(module, "read_source", lambda *given: time.sleep(1))
    with pytest.raises(DataError, match=r"here: listing .* more than 0 s; pack it first"):
        survey(str(folder))


@pytest.mark.parametrize(
    ("splits", "expected"),
    [(["test", "train"], "train"), (["val", "fold"], "fold"), (["val", "test"], "val"), ([None], None), ([], None)],
)
def test_the_split_to_train_on(splits, expected):
    assert training_split({split: {"image": 1} for split in splits}) == expected


def test_the_error_for_a_folder_without_texts_names_what_it_needs(tmp_path):
    (tmp_path / "a.jpg").write_bytes(image())
    with pytest.raises(DataError, match=r"nothing to pack .*a\.jpg: no_caption.* needs a metadata\.jsonl"):
        survey(str(tmp_path))
