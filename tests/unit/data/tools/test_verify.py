"""The report of `verify` has every error once, with shard, key and byte, and no error stops it."""

import io
import json
import os
import signal
import sys
import tarfile
import zlib

import pytest

from tests.support import hostile
from tests.support.progress import run_watched
from tests.support.s3 import s3_server
from tests.support.shards import image, sidecar, video, write_demo_shards, write_tar
from univitar_ds import screen
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.decoding.task_pool import Done, Next, Task, TaskPool
from univitar_ds.data.shards.sources import find_shards
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.tools.shard_check import Bad, Read, ShardCheck, StartPosition, check_shard
from univitar_ds.data.tools.verify import verify

JPEG = image(120, 160)
TEXT = b'{"caption": "an image"}'


def outcome(path, decode=True, **source):
    """{key: kind} of the faults of one shard, checked in this process."""
    (shard,) = find_shards([SourceConfig(path=str(path), **source)])
    events = []
    check_shard(Task(0, ShardCheck(shard, LOCAL, decode), StartPosition()), events.append)
    assert sum(event.bytes for event in events if isinstance(event, Read)) == shard.size
    return {event.key: event.kind for event in events if isinstance(event, Bad)}


def with_checksum(content: bytes, packed: bytes) -> dict[str, bytes]:
    fields = json.loads(sidecar(["a"], None, "image", (120, 160, 1), "a.jpg")) | {"set": None}
    return {"jpg": content, "json": json.dumps(fields | {"crc32": zlib.crc32(packed)}).encode()}


def test_every_kind_of_bad_sample_is_reported_under_its_key(tmp_path):
    half = JPEG[: len(JPEG) // 2]
    samples = [
        ("good", {"jpg": JPEG, "json": TEXT}),
        ("checked", with_checksum(JPEG, JPEG)),
        ("changed", with_checksum(JPEG[:-1] + b"\0", JPEG)),
        ("half", {"jpg": half, "json": TEXT}),
        ("empty", {"jpg": b"", "json": TEXT}),
        ("noise", {"jpg": b"no image", "json": TEXT}),
        ("mute", {"jpg": JPEG}),
        ("blind", {"json": TEXT}),
        ("renamed", {"jpeg_": JPEG, "json": TEXT}),
        ("bare", {"": JPEG, "json": TEXT}),
        ("broken", {"jpg": JPEG, "json": b'{"caption": '}),
        ("film", {"jpg": video(48, 64), "json": TEXT}),
        ("sound", {"mp4": video(48, 64), "json": TEXT}),
        ("labelled", {"jpg": JPEG, "cls": b"cat"}),
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    headers = {
        "changed": "checksum",
        "empty": "unreadable",
        "noise": "unreadable",
        "mute": "no_caption",
        "blind": "no_media",
        "renamed": "no_media",
        "bare": "no_media",
        "broken": "bad_json",
        "film": "wrong_kind",
    }
    assert outcome(path, decode=False, templates=["a {}"]) == headers
    assert outcome(path, templates=["a {}"]) == headers | {"half": "corrupt"}
    assert outcome(path, decode=False) == headers | {"labelled": "no_caption"}


@pytest.mark.parametrize(
    ("limit", "extension", "content"),
    [
        ({"max_image_px": 1000}, "jpg", JPEG),
        ({"max_video_s": 0.1}, "mp4", video(48, 64)),
        ({"max_sample_mb": 1}, "jpg", JPEG + bytes(1 << 20)),
    ],
)
def test_the_limits_of_a_run_apply(tmp_path, limit, extension, content):
    source = SourceConfig(path=str(write_tar(tmp_path / "a.tar", [("k", {extension: content, "json": TEXT})])))
    assert verify([source], progress=False)["sound"]
    limits = DataConfig(sources=[source], **limit)
    found = verify([source], progress=False, limits=limits)
    assert found["bad"] == {"too_large": 1}
    assert next(iter(limit)) in found["shards"][0]["faults"][0]["message"]


def folder_of(tmp_path):
    """Two shards of images and two of videos for training, one of each for test."""
    return write_demo_shards(tmp_path / "demo", images=8, videos=4, shards=2)


def report(folder, **options):
    return verify([SourceConfig(path=str(folder), split=None)], progress=False, **options)


def rows(folder, found):
    return {os.path.relpath(row["path"], folder): row for row in found["shards"]}


def test_a_source_without_errors_is_sound(tmp_path):
    found = report(folder_of(tmp_path))
    assert found["sound"]
    assert found["bad"] == {}
    assert found["samples"] == 8 + 2 + 4 + 1
    assert {row["sha256"] for row in found["shards"]} == {"matches"}
    assert [row["samples"] for row in found["shards"]] == [row["samples_in_manifest"] for row in found["shards"]]


def test_damage_is_reported_with_its_byte_and_the_rest_of_the_shard_is_checked(tmp_path):
    folder = folder_of(tmp_path)
    name = "train-image-000001.tar"
    with tarfile.open(folder / name) as tar:
        third = tar.getmembers()[4].offset
    data = bytearray((folder / name).read_bytes())
    data[third + 10] ^= 1
    (folder / name).write_bytes(bytes(data))
    found = report(folder)
    row = rows(folder, found)[name]
    assert not found["sound"]
    assert row["sha256"] == "differs"
    damage, orphan = row["faults"]
    assert (damage["kind"], damage["key"], damage["byte"]) == ("damaged", "", third)
    assert f"shard train-image-000001: damaged at byte {third}" in damage["message"]
    assert orphan["kind"] == "no_media"
    assert row["bad"] == found["bad"] == {"damaged": 1, "no_media": 1}
    others = [one for path, one in rows(folder, found).items() if path != name]
    assert all(one["sha256"] == "matches" and not one["faults"] for one in others)


def test_the_existing_shards_of_an_incomplete_source_are_checked(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "train-image-000000.tar").unlink()
    cut = folder / "train-video-000001.tar"
    with tarfile.open(cut) as tar:
        size = tar.getmembers()[-1].offset_data + 5
    os.truncate(cut, size)
    found = report(folder, workers=2)
    (source,) = found["sources"]
    assert not found["sound"]
    assert "train-image-000000.tar of its manifest is missing" in source["error"]
    assert source["missing"] == ["train-image-000000.tar"]
    shards = rows(folder, found)
    assert len(shards) == 5
    row = shards["train-video-000001.tar"]
    assert (row["sha256"], row["bytes"], row["bad"]) == ("differs", size, {"cut": 1})
    assert f"cut off at byte {size}" in row["faults"][0]["message"]
    assert row["samples"] == row["samples_in_manifest"] - 1


def test_a_sample_removed_from_a_shard_is_detected_with_the_manifest(tmp_path):
    folder = folder_of(tmp_path)
    path = folder / "train-image-000000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    data = path.read_bytes()
    path.write_bytes(data[: members[0].offset] + data[members[2].offset :] + bytes(members[2].offset))
    row = rows(folder, report(folder))[path.name]
    assert (row["samples"], row["samples_in_manifest"], row["sha256"]) == (3, 4, "differs")
    assert row["faults"] == []


def test_a_wrong_sample_count_in_the_manifest_is_reported_even_if_the_hash_matches(tmp_path):
    folder = folder_of(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["samples"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = report(folder, decode=False)
    assert not found["sound"]
    assert (found["bad"], {row["sha256"] for row in found["shards"]}) == ({}, {"matches"})


def test_the_report_of_a_source_on_s3_is_that_of_the_same_local_files(tmp_path):
    folder = folder_of(tmp_path)
    code = (
        "import json, sys; from univitar_ds.config.schema import SourceConfig;"
        "from univitar_ds.data.storage.base import StorageSettings; from univitar_ds.data.tools.verify import verify;"
        "settings = StorageSettings(endpoint_url=sys.argv[2]);"
        "print(json.dumps(verify([SourceConfig(path=sys.argv[1], split=None)], settings, progress=False)))"
    )
    with s3_server() as server:
        url = server.upload(folder, "some/prefix")
        # In another process, because child processes of this one may have started without credentials.
        run = run_watched([sys.executable, "-c", code, url, server.url])
    assert run.returncode == 0, run.stderr
    here, there = report(folder), json.loads(run.stdout)
    for row, other in zip(here["shards"], there["shards"], strict=True):
        assert other.pop("path") == f"{url}/{os.path.basename(row.pop('path'))}"
    assert there["shards"] == here["shards"]
    assert there["sound"]


def test_a_video_in_a_shard_of_images_is_reported(tmp_path):
    folder = folder_of(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["kind"] = "image"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = report(folder, decode=False)
    assert found["bad"] == {"wrong_kind": 5}


@pytest.mark.parametrize("path", ["nowhere", "nowhere/{0..2}.tar", "ftp://host/a", "empty"])
def test_a_source_without_shards_is_an_error_of_the_source(tmp_path, path):
    (tmp_path / "empty").mkdir()
    where = path if "://" in path else str(tmp_path / path)
    found = verify([SourceConfig(path=where)], progress=False)
    assert not found["sound"]
    assert found["sources"][0]["error"]
    assert found["shards"] == []


def test_a_source_without_a_sample_is_not_sound(tmp_path):
    write_tar(tmp_path / "a0.tar", [])
    found = verify([SourceConfig(path=str(tmp_path))], progress=False)
    assert not found["sound"]
    assert "no sample in its 1 shards" in found["sources"][0]["error"]
    write_tar(tmp_path / "a1.tar", [("k", {"jpg": JPEG, "txt": b"a"})])
    assert verify([SourceConfig(path=str(tmp_path))], progress=False)["sound"]


def test_a_pipe_is_reported_and_the_other_shards_are_checked(tmp_path):
    write_tar(tmp_path / "a0.tar", [("k", {"jpg": JPEG, "cls": b"cat"})])
    os.mkfifo(tmp_path / "a1.tar")
    alone = verify([SourceConfig(path=str(tmp_path / "a1.tar"))], progress=False)
    assert "a1.tar: cannot be read (is not a regular file)" in alone["sources"][0]["error"]
    both = verify([SourceConfig(path=str(tmp_path / "a{0..1}.tar"), templates=["a {}"])], progress=False)
    assert not both["sound"]
    assert both["bad"] == {}, "the templates are used"
    assert both["sources"][0]["missing"] == ["a1.tar"]
    assert both["samples"] == 1


def test_the_report_depends_only_on_the_data(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(screen, "LINES_AFTER_S", 0.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level("INFO")
    folder = folder_of(tmp_path)
    first = folder / "train-image-000000.tar"
    first.write_bytes(first.read_bytes()[:-700] + bytes(700))
    (folder / "train-image-000001.tar").write_bytes(b"no tar" * 1000)
    sources = [SourceConfig(path=str(folder), split=split) for split in ("train", "test")]
    one = verify(sources, workers=1, progress=False)
    assert "verify" not in caplog.text
    two = verify(sources, workers=3)
    assert "verify: 100 %" in caplog.text
    assert json.dumps(one) == json.dumps(two)
    assert [row["shard"] for row in one["shards"]][-1] == "1:test-video-000000"


@pytest.mark.parametrize(("workers", "started"), [(1, 1), (4, 4), (9, 6)])
def test_the_requested_number_of_processes_is_used_but_at_most_one_per_shard(tmp_path, monkeypatch, workers, started):
    pools = []

    class Idle(TaskPool):
        def __init__(self, work, workers, silence_s):
            pools.append((work, workers))

        def run(self, tasks):
            return ((task.number, Done()) for task in tasks)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("univitar_ds.data.tools.verify.TaskPool", Idle)
    assert len(report(folder_of(tmp_path), workers=workers)["shards"]) == 6
    assert pools == [(check_shard, started)]


def crashing(task: Task, report) -> None:
    """`check_shard` in a process that a sample crashes."""

    def report_or_crash(event):
        report(event)
        if isinstance(event, Next) and event.item.key == "b":
            os.kill(os.getpid(), signal.SIGKILL)

    check_shard(task, report_or_crash)


def test_only_the_sample_that_crashes_its_process_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("univitar_ds.data.tools.verify.check_shard", crashing)
    path = write_tar(tmp_path / "a.tar", [(key, {"jpg": JPEG, "json": TEXT}) for key in "abc"])
    found = report(path)
    (shard,) = found["shards"]
    assert (shard["samples"], shard["bad"]) == (3, {"crash": 1})
    (fault,) = shard["faults"]
    assert (fault["key"], fault["message"]) == ("b", "the process that worked on it died (exit code -9)")


@pytest.mark.parametrize("decode", [True, False])
def test_metadata_that_differs_from_its_file_is_reported(tmp_path, decode):
    def packed(media, kind, size):
        about = json.loads(sidecar(["a"], None, kind, size, "f")) | {"set": None, "crc32": None}
        return {"jpg" if kind == "image" else "mp4": media, "json": json.dumps(about).encode()}

    moving = video(48, 64, 6)
    samples = [
        ("right", packed(JPEG, "image", (120, 160, 1))),
        ("turned", packed(JPEG, "image", (160, 120, 1))),
        ("swapped", packed(moving, "image", (120, 160, 1))),
        ("video", packed(moving, "video", (48, 64, 6, 0.3))),
        ("large", packed(moving, "video", (480, 640, 6, 0.3))),
        ("long", packed(moving, "video", (48, 64, 6, 80.0))),
    ]
    expected = {"turned": "wrong_size", "swapped": "wrong_kind", "large": "wrong_size", "long": "wrong_size"}
    assert outcome(write_tar(tmp_path / "a.tar", samples), decode) == expected


def test_hostile_media_are_bad_samples_and_others_are_not(tmp_path):
    names = ["60 million frames.mp4", "flood.mp4", "screen.gif", "tile.tif", "profile.png"]
    samples = [(str(number), {name[-3:]: hostile.FILES[name](), "json": TEXT}) for number, name in enumerate(names)]
    (shard,) = report(write_tar(tmp_path / "a.tar", [*samples, ("good", {"jpg": JPEG, "json": TEXT})]))["shards"]
    assert shard["samples"] == 6
    assert {fault["key"] for fault in shard["faults"]} == set("01234")
    assert set(shard["bad"]) <= {"corrupt", "too_large", "no_video"}
