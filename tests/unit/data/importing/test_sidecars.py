"""Folders with a .txt for each media file: links, unusual names, several lines."""

import json
import logging
import os

import pytest

from tests.support import media
from tests.support.packing import contents, image_row, pack, samples_of
from univitar_ds.cli.main import main
from univitar_ds.data.importing import folders
from univitar_ds.data.importing.sidecars import read_sidecars
from univitar_ds.errors import DataError

IMAGE = media.encoded(media.noise(20, 30))
LINK = "link: the folder is packed under another path, or contains the folder that is being packed"


def put(folder, *names, text=b"a caption"):
    """Write images, each with a .txt of the same name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGE)
        (folder / name).with_suffix(".txt").write_bytes(text)
    return folder


def test_linked_folders_are_packed_once_and_cycles_are_not_followed(tmp_path):
    folder, elsewhere = put(tmp_path / "folder", "own/a.jpg"), put(tmp_path / "elsewhere", "b.jpg", "deep/c.jpg")
    (folder / "away").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (folder / "before").symlink_to(folder / "own")
    (folder / "own/up").symlink_to("..")
    (folder / "above").symlink_to(tmp_path)
    (folder / "nowhere").symlink_to(tmp_path / "missing")
    (folder / ".hidden").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "self").symlink_to(elsewhere)
    manifest = pack(folder, tmp_path / "out")
    assert sorted(samples_of(tmp_path / "out", manifest)) == ["again/c.jpg", "away/b.jpg", "own/a.jpg"]
    assert {row["file"]: row["reason"] for row in manifest["skipped"]} == dict.fromkeys(
        ["above", "away/deep", "before", "own/up", "away/back", "away/self"], LINK
    )
    packed = contents(tmp_path / "out")
    assert pack(folder, tmp_path / "out") == manifest
    assert contents(tmp_path / "out") == packed


def test_a_folder_that_cannot_be_read_is_reported(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "closed/b.jpg")
    real = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    found = read_sidecars(tmp_path, lines=False)
    assert found.captions == {"a.jpg": ("a caption",)}
    assert found.left_out == {"closed": "unreadable: the folder cannot be read: Permission denied"}


def test_texts_are_found_for_extensions_in_any_case_and_names_with_dots(tmp_path):
    for media_name, text_name in (
        ("A.JPG", "A.TXT"),
        ("b.Jpeg", "b.Txt"),
        ("photo.v2.jpg", "photo.v2.txt"),
        ("photo.v3.JPG", "photo.v3.TXT"),
        ("both.jpg", "both.TXT"),
    ):
        (tmp_path / media_name).write_bytes(IMAGE)
        (tmp_path / text_name).write_text(f"of {media_name}")
    (tmp_path / "both.txt").write_text("the plain name")
    (tmp_path / "photo.v4.jpg").write_bytes(IMAGE)
    (tmp_path / "photo.txt").write_text("of no file of this name")
    manifest = pack(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    samples = samples_of(tmp_path.parent / f"{tmp_path.name}-out", manifest)
    assert {file: json.loads(members["json"])["captions"][0] for file, members in samples.items()} == {
        "A.JPG": "of A.JPG",
        "b.Jpeg": "of b.Jpeg",
        "photo.v2.jpg": "of photo.v2.jpg",
        "photo.v3.JPG": "of photo.v3.JPG",
        "both.jpg": "the plain name",
    }
    assert manifest["skipped"] == [{"file": "photo.v4.jpg", "reason": "no_caption: there is no .txt of the same name"}]


def test_lines_are_captions_if_the_option_is_given_and_cause_a_warning_otherwise(tmp_path, caplog, capsys):
    folder = put(tmp_path / "folder", "a.jpg", "b.jpg", text=b"one  caption\r\n\nanother\n")
    with caplog.at_level(logging.WARNING):
        joined = read_sidecars(folder, lines=False)
    assert joined.captions == dict.fromkeys(["a.jpg", "b.jpg"], ("one caption another",))
    assert "pack with --captions lines" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert main(["data", "pack", str(folder), str(tmp_path / "out"), "--captions", "lines", "--workers", "1"]) in (
            None,
            0,
        )
    assert caplog.text == ""
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["captions"] == 4
    (folder / "c.jpg").write_bytes(IMAGE)
    (folder / "c.txt").write_text("of one line")
    with caplog.at_level(logging.WARNING):
        read_sidecars(folder, lines=False)
    assert caplog.text == ""
    rows = media.write_folder(tmp_path / "rows", {"images/0.jpg": IMAGE}, [image_row(0)])
    with pytest.raises(DataError, match=r"metadata\.jsonl lists captions itself"):
        pack(rows, tmp_path / "out2", captions="lines")
