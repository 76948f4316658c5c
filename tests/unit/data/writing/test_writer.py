"""Packing a folder: what it writes, leaves out and rejects."""

import hashlib
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.support import media
from tests.support.packing import contents, image_row, numbers_folder, pack, samples_of
from univitar_ds.data.media.probe import probe
from univitar_ds.data.shards.captions import BYTES_LIMIT
from univitar_ds.data.storage import local
from univitar_ds.data.writing import writer
from univitar_ds.data.writing.progress_log import open_progress_log
from univitar_ds.data.writing.writer import read_manifest
from univitar_ds.errors import DataError, StorageError


@pytest.fixture
def folder(tmp_path):
    return numbers_folder(tmp_path)


def test_shards_contain_every_file_unchanged_with_its_metadata(folder, tmp_path):
    manifest = pack(folder, tmp_path / "out")
    samples = samples_of(tmp_path / "out", manifest)
    assert len(samples) == 34
    for line in (folder / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        sample = samples[row["file"]]
        extension = row["file"].rsplit(".")[-1]
        data = (folder / row["file"]).read_bytes()
        size = probe(data, extension)
        assert sample[extension] == data
        assert json.loads(sample["json"]) == {
            "captions": row.get("captions") or [row["caption"]],
            "label": row.get("label"),
            "set": row.get("set"),
            "kind": row["kind"],
            "width": size.width,
            "height": size.height,
            "frames": size.frames,
            "duration_s": size.duration_s,
            "file": row["file"],
            "crc32": zlib.crc32(data),
        }
        assert sample["shard"] == f"{row.get('split', 'train')}-{row['kind']}-000000.tar"


def test_the_duration_of_a_sample_is_exactly_that_of_its_header(tmp_path):
    frames = media.grey_frames(7)
    files = {
        "a.mp4": media.video(frames, rate=30),
        "b.webm": media.video(frames, "webm", "libvpx", rate=24),
        "c.jpg": media.encoded(media.noise(20, 20)),
        "d.png": media.encoded(media.noise(20, 20), "PNG"),
    }
    rows = [{"file": name, "caption": "x"} for name in files]
    out = tmp_path / "out"
    manifest = pack(media.write_folder(tmp_path / "folder", files, rows), out)
    packed = {file: json.loads(sample["json"])["duration_s"] for file, sample in samples_of(out, manifest).items()}
    assert packed == {file: probe(data, file.partition(".")[2]).duration_s for file, data in files.items()}
    assert packed["a.mp4"] == pytest.approx(7 / 30, abs=0.01)
    assert packed["b.webm"] == pytest.approx(7 / 24, abs=0.05)
    assert (packed["c.jpg"], packed["d.png"]) == (0.0, 0.0)


def test_the_manifest_counts_the_samples(folder, tmp_path):
    manifest = pack(folder, tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest["counts"] == {"test": {"image": 6}, "train": {"image": 24, "video": 4}}
    assert manifest["labels"] == {"test": {"even": 3, "odd": 3}, "train": {"even": 12, "odd": 12}}
    assert manifest["captions"] == 30 + 2 * 4
    assert manifest["skipped"] == []
    assert manifest["token_histogram"] == {"image": {"8-15": 11, "16-31": 19}, "video": {"16-31": 4}}
    assert manifest["long_side_px_histogram"] == {"image": {"32-63": 24, "64-127": 6}, "video": {"64-127": 4}}
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert data.endswith(bytes(1024))


def test_packing_twice_writes_the_same_bytes(folder, tmp_path):
    pack(folder, tmp_path / "one", shard_mb=0.01)
    pack(folder, tmp_path / "two", shard_mb=0.01, verify=False)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert len(one) > 6
    del one[".pack.jsonl"], two[".pack.jsonl"]
    assert one == two


def test_shards_stay_within_their_size_and_mix_the_classes(tmp_path):
    files = {f"{i:03d}.png": media.encoded(Image.new("RGB", (i + 1, 5)), "PNG") + bytes(900) for i in range(200)}
    rows = [{"file": f"{i:03d}.png", "caption": "x", "label": "early" if i < 100 else "late"} for i in range(200)]
    manifest = pack(media.write_folder(tmp_path / "folder", files, rows), tmp_path / "out", shard_mb=0.05)
    assert len(manifest["shards"]) >= 4
    for shard in manifest["shards"][:-1]:
        with tarfile.open(tmp_path / "out" / shard["file"]) as tar:
            members = tar.getmembers()
            assert 45_000 < sum(member.size for member in members if member.name.endswith("png")) <= 50_000
            labels = [json.load(tar.extractfile(m))["label"] for m in members if m.name.endswith("json")]
            assert 0.25 < labels.count("early") / len(labels) < 0.75
            assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) for m in members)


def test_keys_are_unique_ascii_names_for_all_file_names(tmp_path):
    names = [
        "a/same.jpg",
        "b/same.jpg",
        "c/same.png",
        "d/two.dots.here.jpg",
        "é 日本.jpg",
        "-dash.jpg",
        "x" * 150 + ".jpg",
    ]
    files = {name: media.encoded(media.noise(20, 20, i)) for i, name in enumerate(names)}
    rows = [{"file": name, "caption": "x"} for name in names]
    manifest = pack(media.write_folder(tmp_path / "folder", files, rows), tmp_path / "out", shard_mb=0.001)
    assert set(samples_of(tmp_path / "out", manifest)) == set(names)
    keys = []
    for shard in manifest["shards"]:
        with tarfile.open(tmp_path / "out" / shard["file"]) as tar:
            keys += tar.getnames()
    assert len({key.split(".")[0] for key in keys}) == len(names)
    assert all(key.isascii() and key.count(".") == 1 and len(key) < 100 for key in keys)


def test_unreadable_media_are_left_out_and_listed(folder, tmp_path):
    good = (folder / "images/3.jpg").read_bytes()
    (folder / "images/1.jpg").write_bytes(good[:-40])
    (folder / "images/2.jpg").write_bytes(b"")
    (folder / "images/3.jpg").write_bytes(media.video(media.grey_frames(3)))
    (folder / "clips/video 1.mp4").write_bytes(media.sound())
    manifest = pack(folder, tmp_path / "out")
    assert manifest["counts"]["train"] == {"image": 21, "video": 3}
    reasons = {skipped["file"]: skipped["reason"] for skipped in manifest["skipped"]}
    assert reasons.keys() == {"images/1.jpg", "images/2.jpg", "images/3.jpg", "clips/video 1.mp4"}
    assert reasons["images/1.jpg"].startswith("corrupt: the JPEG image cannot be decoded")
    assert reasons["images/2.jpg"] == "unreadable: the file is empty"
    assert reasons["images/3.jpg"] == "wrong_kind: the file holds video data, its row says image"
    assert reasons["clips/video 1.mp4"].startswith("no_video")
    assert "images/1.jpg" not in samples_of(tmp_path / "out", manifest)


def test_without_verifying_only_headers_are_read(folder, tmp_path):
    good = (folder / "images/1.jpg").read_bytes()
    (folder / "images/1.jpg").write_bytes(good[:-40])
    assert pack(folder, tmp_path / "out", verify=False)["skipped"] == []


def test_an_animated_gif_with_kind_video_in_its_row_is_packed_as_a_video(tmp_path):
    frames = [Image.fromarray(frame) for frame in media.grey_frames(6, 40, 64)]
    data = media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    rows = [{"file": "a.gif", "kind": "video", "caption": "x"}, {"file": "b.gif", "caption": "x"}]
    out = tmp_path / "out"
    manifest = pack(media.write_folder(tmp_path / "folder", {"a.gif": data, "b.gif": data}, rows), out)
    samples = samples_of(out, manifest)
    assert probe(samples["a.gif"]["gifv"], "gifv").kind == "video"
    assert json.loads(samples["a.gif"]["json"])["frames"] == 6
    assert probe(samples["b.gif"]["gif"], "gif").kind == "image"


def test_a_member_gets_an_extension_that_matches_its_kind(tmp_path):
    files = {"a.bin": media.encoded(media.noise(20, 20)), "b.jpg": media.video(media.grey_frames(3), "matroska")}
    rows = [{"file": name, "caption": "x"} for name in files]
    manifest = pack(media.write_folder(tmp_path / "folder", files, rows), tmp_path / "out")
    samples = samples_of(tmp_path / "out", manifest)
    assert {"jpg", "json", "shard"} == samples["a.bin"].keys()
    assert {"mkv", "json", "shard"} == samples["b.jpg"].keys()


def test_a_folder_without_metadata_takes_its_captions_from_texts(tmp_path):
    plain = tmp_path / "plain"
    (plain / "deep").mkdir(parents=True)
    (plain / ".hidden").mkdir()
    for name in ("a.jpg", "deep/b.png", "lonely.jpg", ".hidden/c.jpg"):
        (plain / name).write_bytes(media.encoded(media.noise(20, 30), "PNG" if name.endswith("png") else "JPEG"))
    (plain / "a.txt").write_text("  a caption\nof two lines \n")
    (plain / "deep/b.txt").write_text("日本", encoding="utf-8-sig")
    manifest = pack(plain, tmp_path / "out")
    samples = samples_of(tmp_path / "out", manifest)
    assert {file: json.loads(sample["json"])["captions"] for file, sample in samples.items()} == {
        "a.jpg": ["a caption of two lines"],
        "deep/b.png": ["日本"],
    }
    assert manifest["counts"] == {"train": {"image": 2}}
    assert manifest["skipped"] == [{"file": "lonely.jpg", "reason": "no_caption: there is no .txt of the same name"}]


def test_a_broken_link_and_a_pipe_are_left_out_with_the_reason(tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    plain.mkdir()
    (plain / "a.jpg").write_bytes(media.encoded(media.noise(20, 30)))
    (plain / "gone.jpg").symlink_to(tmp_path / "nowhere")
    os.mkfifo(plain / "pipe.jpg")
    for name in ("a", "gone", "pipe"):
        (plain / f"{name}.txt").write_text("a caption")
    manifest = pack(plain, out)
    assert manifest["skipped"] == [
        {"file": "gone.jpg", "reason": "unreadable: the file cannot be read: No such file or directory"},
        {"file": "pipe.jpg", "reason": "unreadable: the file cannot be read: is not a regular file"},
    ]
    assert manifest["counts"] == {"train": {"image": 1}}
    packed = contents(out)
    assert pack(plain, out) == manifest
    assert contents(out) == packed

    (tmp_path / "nowhere").write_bytes(media.encoded(media.noise(20, 40)))
    assert pack(plain, out)["counts"] == {"train": {"image": 2}}


def test_texts_that_cannot_be_read_are_reported(tmp_path, monkeypatch):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.jpg").write_bytes(media.encoded(media.noise(20, 20)))
    (tmp_path / "a.txt").write_bytes(b"words")
    monkeypatch.setattr(local, "open_regular", refused)
    with pytest.raises(DataError, match=r"1 left out.*a\.jpg: unreadable: a\.txt: .*cannot be read: Permission denied"):
        pack(tmp_path, tmp_path.parent / "out")
    (tmp_path / "metadata.jsonl").write_bytes(b"{}")
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"metadata\.jsonl: cannot be read \(Permission denied\)"):
        pack(tmp_path, tmp_path.parent / "out")


def test_only_the_file_of_an_invalid_or_empty_text_is_left_out(tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    texts = {"a": b"caf\xe9", "b": b" \n", "c": b"", "d": b"fine", "e": b"x" * (BYTES_LIMIT + 1), "f": b"n\0u\0l\0"}
    for name, text in texts.items():
        (plain / f"{name}.jpg").write_bytes(media.encoded(media.noise(20, 20)))
        (plain / f"{name}.txt").write_bytes(text)
    manifest = pack(plain, tmp_path / "out")
    assert manifest["counts"] == {"train": {"image": 1}}
    assert {row["file"]: row["reason"] for row in manifest["skipped"]} == {
        "a.jpg": "bad_caption: a.txt: byte 3 is not UTF-8 text",
        "b.jpg": "bad_caption: b.txt: the caption is empty",
        "c.jpg": "bad_caption: c.txt: the caption is empty",
        "e.jpg": "too_large: e.txt: the file has 1048577 bytes (limit 1048576)",
        "f.jpg": "bad_caption: f.txt: is not UTF-8 text: character 1 is NUL",
    }
    packed = contents(tmp_path / "out")
    assert pack(plain, tmp_path / "out") == manifest
    assert contents(tmp_path / "out") == packed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file": "images/0.jpg", "caption"', "not JSON"),
        ("[1, 2]", "a list, not an object"),
        (image_row(0, caption=7), "caption 7 is not text"),
        (image_row(0, caption=None), "caption None is not text"),
        (image_row(0, caption="  "), "caption '  ' is not text"),
        (image_row(0, captions=["fine", ["no"]]), r"caption \['no'\] is not text"),
        (image_row(0, captions=[]), r"captions \[\] is not a list"),
        (image_row(0, captions="text"), "captions 'text' is not a list"),
        ({"file": "images/0.jpg"}, "captions \\[\\] is not a list"),
        ({"caption": "x"}, "file None is not a path"),
        (image_row(0, file="../secret.jpg"), "'../secret.jpg' must be a path relative to the folder"),
        (image_row(0, file="images/../../secret.jpg"), "must be a path relative to the folder"),
        (image_row(0, file="/etc/passwd"), "'/etc/passwd' must be a path relative to the folder"),
        (image_row(0, file="images/none.jpg"), "'images/none.jpg' is missing"),
        (image_row(0, file="images"), "'images' is missing"),
        (image_row(0, file="a\0b"), "is not a path"),
        (image_row(0, kind="audio"), "kind 'audio' is neither image nor video"),
        (image_row(0, split="../up"), "split '../up' is not a name"),
        (image_row(0, split=3), "split 3 is not a name"),
        (image_row(0, label=["x"]), r"label \['x'\] is not text"),
        (image_row(0, set=7), "set 7 is not text"),
        (image_row(1), r"'images/1\.jpg' is in line 1 too"),
    ],
)
def test_a_row_with_an_error_ends_packing_before_anything_is_written(tmp_path, row, message):
    files = {f"images/{i}.jpg": media.encoded(media.noise(20, 20)) for i in range(2)}
    folder = media.write_folder(tmp_path / "folder", files, [image_row(1), row])
    with pytest.raises(DataError, match=r"1 faults.*metadata\.jsonl:2: .*" + message):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_first_five_errors_are_reported_with_their_number(tmp_path):
    rows = [image_row(i) for i in range(12)]
    with pytest.raises(DataError, match=r"12 faults.*jsonl:1:.*jsonl:5:.*and 7 more") as caught:
        pack(media.write_folder(tmp_path / "folder", {"x.jpg": b""}, rows), tmp_path / "out")
    assert "jsonl:6:" not in str(caught.value)


def test_blank_lines_and_a_byte_order_mark_are_ignored(folder, tmp_path):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text("\ufeff" + text.replace("\n", "\n\n"), encoding="utf-8")
    assert sum(pack(folder, tmp_path / "out")["counts"]["train"].values()) == 28


def test_a_folder_with_nothing_to_pack_is_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has nothing to pack"):
        pack(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty/a.jpg").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"nothing to pack \(1 left out, the first: a\.jpg: no_caption: there is no \.txt"
    ):
        pack(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="is not a folder;"):
        pack(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match=r"shard\.tar is missing \(1 of 1 are\)"):
        pack(tmp_path / "shard.tar", tmp_path / "out")
    broken = media.write_folder(tmp_path / "broken", {"a.jpg": b"x"}, [{"file": "a.jpg", "caption": "x"}])
    with pytest.raises(DataError, match=r"none of its 1 media files can be read; the first: a\.jpg: unreadable"):
        pack(broken, tmp_path / "out2")
    assert not list((tmp_path / "out2").glob("*.tar"))


def test_an_output_folder_with_other_content_is_not_changed(folder, tmp_path):
    for inside in (folder, folder / "images" / "out"):
        with pytest.raises(DataError, match="is inside"):
            pack(folder, inside)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_text("years of work")
    with pytest.raises(DataError, match=r"contains thesis\.doc but no packing log"):
        pack(folder, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.doc"]
    other = media.write_folder(
        tmp_path / "other", {"a.jpg": media.encoded(media.noise(9, 9))}, [{"file": "a.jpg", "caption": "x"}]
    )
    pack(other, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"holds shards packed from .*other"):
        pack(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_files_of_the_user_in_the_output_folder_are_kept(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out, shard_mb=0.01)
    mine = ["mine-image-000000.tar", "notes.txt", ".notes.txt.partial", ".thesis.partial/chapter.txt"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("years of work")
    left = out / ".train-image-000000.tar.partial"
    left.write_text("left by a kill")
    pack(folder, out, shard_mb=1.0)
    assert [(out / name).read_text() for name in mine] == ["years of work"] * 4
    assert not left.exists()
    assert sum(path.name.startswith("train-image") for path in out.glob("*.tar")) == 1


def test_a_file_of_the_user_with_the_name_of_a_shard_is_not_replaced(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out, shard_mb=1.0)
    mine = out / "train-image-000001.tar"
    mine.write_text("years of work")
    with pytest.raises(DataError, match=r"out holds train-image-000001\.tar, which was not packed there; move it"):
        pack(folder, out, shard_mb=0.01)
    assert mine.read_text() == "years of work"
    mine.unlink()
    pack(folder, out, shard_mb=0.01)
    assert mine.stat().st_size > 1000


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3://", "s3:// names no bucket; write s3://BUCKET/PREFIX"),
        ("s3:///prefix/", "names no bucket"),
        ("gs://bucket/prefix", "cannot write to gs://; give a local path or an s3:// address"),
    ],
)
def test_an_address_that_cannot_be_written_is_rejected_and_no_folder_is_created(
    folder, tmp_path, monkeypatch, out, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=re.escape(message)):
        pack(folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_two_processes_cannot_pack_into_one_folder_at_once(folder, tmp_path):
    out = tmp_path / "out"
    with (
        open_progress_log(out, str(folder.resolve())),
        pytest.raises(DataError, match="another process is packing into"),
    ):
        pack(folder, out)
    pack(folder, out)


def test_a_full_disk_leaves_no_manifest_that_describes_other_shards(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(folder, out)
    (folder / "images/7.jpg").write_bytes(media.encoded(media.noise(99, 99)))

    def full(*_):
        raise OSError(28, "No space left on device", str(out / "x.tar"))

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_shard", full)
        with pytest.raises(StorageError, match=r"x\.tar cannot be written: No space left on device"):
            pack(folder, out)
    assert not (out / "manifest.json").exists()
    assert pack(folder, out) == pack(folder, tmp_path / "fresh")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no manifest.json, so its packing did not end"),
        (b"{", "cannot be read"),
        (b"[]", "has version None"),
        (b'{"version": 99}', "has version 99, this program reads 1"),
        (b'{"version": 1}', "no valid list of shards"),
        (b'{"version": 1, "shards": [{"file": "a.tar"}]}', "no valid list of shards"),
        (
            json.dumps(
                {
                    "version": 1,
                    "shards": [
                        {"file": "../a.tar", "split": "x", "kind": "image", "samples": 1, "bytes": 1, "sha256": ""}
                    ],
                }
            ).encode(),
            "no valid list of shards",
        ),
    ],
)
def test_an_invalid_manifest_is_rejected(tmp_path, content, message):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 0.0, -1.0])
def test_an_invalid_size_of_shards_is_refused(tmp_path, size):
    with pytest.raises(DataError, match=f"--shard-mb {size}: .* finite size above 0"):
        pack(tmp_path, tmp_path / "out", shard_mb=size)
