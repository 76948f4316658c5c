"""Tars of img2dataset and WebDataset: hostile members, damaged parts and repeated keys."""

import json
import re
import tarfile

import pytest

from tests.support import media
from tests.support.datasets import image, write, write_tar
from tests.support.packing import pack, samples_of
from tests.unit.data.importing.listing import listed, texts_of
from univitar_ds.errors import DataError


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
