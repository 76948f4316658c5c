"""Uploads to a store on loopback are atomic and survive faults and kills."""

import hashlib
import json
import os
import random
import shutil
import sys

import pytest

from tests.support import media
from tests.support.packing import spoil
from tests.support.paths import ROOT
from tests.support.progress import run_watched
from tests.support.s3 import BUCKET, faulty, first_of, s3_server, some_of
from univitar_ds.config.data import SourceConfig
from univitar_ds.data.shards.listing import list_shards
from univitar_ds.data.storage import retry, s3_upload
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.s3 import S3Storage
from univitar_ds.data.writing.writer import PackOptions, pack_folder
from univitar_ds.errors import DataError

PACKING = {"workers": 1, "progress": False, "shard_mb": 0.01}
PART = 5 << 20  # the minimum of S3
CONTENT = random.Random(0).randbytes(2 * PART + 1234)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="module")
def server():
    with s3_server() as started:
        yield started


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(s3_upload, "PART_BYTES", PART)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.001)


def settings(url, tmp_path) -> StorageSettings:
    (tmp_path / "session").mkdir(exist_ok=True)
    return StorageSettings(url, idle_timeout_s=1.5, give_up_s=300.0, session=str(tmp_path / "session"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def uploads(server) -> list[str]:
    return [row["Key"] for row in server.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())]


def test_a_large_file_is_uploaded_in_parts_and_a_small_one_in_one_request(server, file, tmp_path):
    with faulty(server, lambda request: None) as proxy:
        storage = S3Storage(settings(proxy.url, tmp_path))
        s3_upload.put_file(storage, f"s3://{BUCKET}/large", file, SHA256)
        s3_upload.put_bytes(storage, f"s3://{BUCKET}/small", b"abc")
        puts = [(request.key, request.query.partition("&")[0]) for request in proxy.requests if request.method == "PUT"]
    assert server.get("large") == CONTENT
    assert server.get("small") == b"abc"
    assert [key for key, _ in puts] == ["large"] * 3 + ["small"]
    storage = S3Storage(settings(server.url, tmp_path))
    assert s3_upload.holds(storage, f"s3://{BUCKET}/large", len(CONTENT), SHA256)
    assert not s3_upload.holds(storage, f"s3://{BUCKET}/large", len(CONTENT), "0" * 64)
    assert not s3_upload.holds(storage, f"s3://{BUCKET}/large", 5, SHA256)
    assert not s3_upload.holds(storage, f"s3://{BUCKET}/none", 5, SHA256)


@pytest.mark.parametrize("fault", ["throttle", "error", "reset", "lost", "flip"])
def test_an_upload_is_complete_after_faults(server, file, tmp_path, fault):
    url = f"s3://{BUCKET}/through/{fault}"
    writes = some_of([fault], 0.5, seed=2, only=lambda request: request.method != "GET")
    if fault == "flip":  # three in a row are an error
        writes = first_of("flip", 2, only=lambda request: request.method == "PUT")
    with faulty(server, writes) as proxy:
        s3_upload.put_file(S3Storage(settings(proxy.url, tmp_path)), url, file, SHA256)
        assert proxy.faults[fault] >= 2
    assert server.get(f"through/{fault}") == CONTENT
    assert uploads(server) == []


def test_a_lost_answer_to_the_last_request_is_not_an_error(server, file, tmp_path):
    """The store may have forgotten a completed upload when the request is repeated."""
    faults = iter(["lost", "gone"])

    def finishing(request):
        return next(faults, None) if request.method == "POST" and "uploadId" in request.query else None

    with faulty(server, finishing) as proxy:
        s3_upload.put_file(S3Storage(settings(proxy.url, tmp_path)), f"s3://{BUCKET}/answer", file, SHA256)
        assert proxy.faults == {"lost": 1, "gone": 1}
    assert server.get("answer") == CONTENT


def test_parts_that_always_arrive_damaged_are_an_error_and_leave_no_object(server, file, tmp_path):
    with faulty(server, lambda request: "flip" if request.method == "PUT" else None) as proxy:
        storage = S3Storage(settings(proxy.url, tmp_path))
        with pytest.raises(DataError, match=r"/damaged: .* 3 times; check the network"):
            s3_upload.put_file(storage, f"s3://{BUCKET}/damaged", file, SHA256)
    assert server.keys("damaged") == []
    assert uploads(server) == []


def test_damaged_parts_are_sent_again_to_a_store_that_encrypts(server, file, tmp_path):
    """Its ETags are not MD5 sums, so only its check of Content-MD5 detects damage. Every part arrives damaged once."""
    sent = set()

    def encrypting(request):
        if request.method != "PUT":
            return "encrypt" if "uploadId" in request.query else None
        fault = "encrypt" if (request.key, request.query) in sent else "encrypt flip"
        sent.add((request.key, request.query))
        return fault

    with faulty(server, encrypting) as proxy:
        storage = S3Storage(settings(proxy.url, tmp_path))
        s3_upload.put_file(storage, f"s3://{BUCKET}/encrypted/large", file, SHA256)
        s3_upload.put_bytes(storage, f"s3://{BUCKET}/encrypted/small", b"abc")
        assert proxy.faults == {"encrypt flip": 4, "encrypt": 5}
    assert server.get("encrypted/large") == CONTENT
    assert server.get("encrypted/small") == b"abc"


def test_the_next_upload_aborts_an_unfinished_one_of_the_same_object(server, file, tmp_path):
    for key in ("again", "again-not-this"):
        server.client.create_multipart_upload(Bucket=BUCKET, Key=key)
    s3_upload.put_file(S3Storage(settings(server.url, tmp_path)), f"s3://{BUCKET}/again", file, SHA256)
    assert uploads(server) == ["again-not-this"]


@pytest.fixture
def folder(tmp_path):
    """40 images and 3 videos."""
    files = {f"{i}.jpg": media.encoded(media.noise(40 + i, 60, i)) for i in range(40)}
    files |= {f"clip {i}.mp4": media.video(media.grey_frames(4 + i)) for i in range(3)}
    return media.write_folder(tmp_path / "folder", files, [{"file": name, "caption": name} for name in files])


def pack(folder, out, tmp_path, url, **more):
    given = {"settings": settings(url, tmp_path), "state": tmp_path / "state"}
    given |= {name: more.pop(name) for name in given if name in more}
    return pack_folder(folder, out, PackOptions(**{**PACKING, **more}), **given)


def contents(server, prefix) -> dict[str, bytes]:
    return {key.removeprefix(f"{prefix}/"): server.get(key) for key in server.keys(f"{prefix}/")}


def local_contents(folder, tmp_path) -> dict[str, bytes]:
    out = tmp_path / "local"
    pack_folder(folder, out, PackOptions(**PACKING))
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def test_packing_to_a_bucket_and_to_a_folder_gives_the_same_bytes(server, folder, tmp_path):
    with faulty(server, some_of(["throttle", "reset", "lost", "error"], 0.4, seed=5)) as proxy:
        manifest = pack(folder, f"s3://{BUCKET}/packed/", tmp_path, proxy.url)
        assert sum(proxy.faults.values()) > 5
        written = [request.key for request in proxy.requests if request.method == "PUT"]
    assert len(manifest["shards"]) > 3
    there = contents(server, "packed")
    claim = there.pop(".pack.jsonl")
    assert str(tmp_path).encode() not in claim
    assert there == local_contents(folder, tmp_path)
    assert written[0] == "packed/.pack.jsonl"
    assert written[-1] == "packed/manifest.json"
    assert [path.name for path in tmp_path.glob("state/*/*") if ".tar" in path.name] == []
    shards = list_shards(SourceConfig(path=f"s3://{BUCKET}/packed"), "", settings(server.url, tmp_path))
    assert [shard.sha256 for shard in shards] == [row["sha256"] for row in manifest["shards"]]


def test_packing_again_uploads_only_changed_shards(server, folder, tmp_path):
    out = f"s3://{BUCKET}/again/"
    first = pack(folder, out, tmp_path, server.url)

    def sent(**more):
        with faulty(server, lambda request: None) as proxy:
            pack(folder, out, tmp_path, proxy.url, **more)
            return [f"{r.method} {r.key}" for r in proxy.requests if r.method in ("PUT", "POST", "DELETE")]

    whole = shutil.copytree(folder, tmp_path / "whole")
    before = contents(server, "again")
    spoil(folder)
    assert pack(folder, out, tmp_path, server.url) == first
    assert contents(server, "again") == before
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    # Without the local state shards are written again, found in the bucket, and not uploaded.
    assert sent(state=tmp_path / "lost") == ["PUT again/manifest.json"]
    (folder / "3.jpg").write_bytes(media.encoded(media.noise(99, 99)))
    changed = sent(state=tmp_path / "lost")
    assert changed[0] == "DELETE again/manifest.json"
    assert changed[-1] == "PUT again/manifest.json"
    assert 3 <= len(changed) < 8
    there = contents(server, "again")
    del there[".pack.jsonl"]
    assert there == local_contents(folder, tmp_path)


def test_old_shards_are_removed_and_foreign_objects_are_kept(server, folder, tmp_path):
    out = f"s3://{BUCKET}/resized"
    pack(folder, out, tmp_path, server.url)
    server.put("resized/README.txt", b"mine")
    pack(folder, out, tmp_path, server.url, shard_mb=1.0)
    assert sorted(contents(server, "resized")) == [
        ".pack.jsonl",
        "README.txt",
        "manifest.json",
        "train-image-000000.tar",
        "train-video-000000.tar",
    ]


def test_packing_to_a_prefix_with_other_content_is_an_error(server, folder, tmp_path):
    server.put("thesis/chapter.doc", b"years of work")
    with pytest.raises(DataError, match=r"thesis contains chapter\.doc"):
        pack(folder, f"s3://{BUCKET}/thesis", tmp_path, server.url)
    server.put("other/.pack.jsonl", json.dumps({"origin": "another folder"}).encode())
    with pytest.raises(DataError, match="other holds shards packed from another folder"):
        pack(folder, f"s3://{BUCKET}/other", tmp_path, server.url)
    assert sorted(server.keys("thesis") + server.keys("other")) == ["other/.pack.jsonl", "thesis/chapter.doc"]


_KILLED = """
import json, os, signal, sys
import boto3
from pathlib import Path
from univitar_ds.data.storage import s3_client
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.writing import writer

url, folder, out, state, *points = sys.argv[1:]
call = s3_client.Connection.call
for point in points:
    child = os.fork()
    if child == 0:
        left = [int(point)]
        def dying(*arguments, **parameters):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **parameters)
        s3_client.Connection.call = dying
        settings = StorageSettings(url)
        options = writer.PackOptions(shard_mb=0.01, workers=1, progress=False)
        writer.pack_folder(folder, out, options, settings=settings, state=Path(state))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"packing had ended before request {point}"
"""


@pytest.mark.slow
def test_packing_gives_the_same_bytes_after_a_kill_at_any_request(server, folder, tmp_path):
    out = f"s3://{BUCKET}/killed"
    points = [str(random.Random(number).randrange(4, 12)) for number in range(5)]
    command = [sys.executable, "-c", _KILLED, server.url, str(folder), out, str(tmp_path / "state"), "0", "1", *points]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = run_watched(command, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "killed/manifest.json" not in server.keys("killed")
    with pytest.raises(DataError, match="its packing did not end"):
        list_shards(SourceConfig(path=out), "", settings(server.url, tmp_path))
    pack(folder, out, tmp_path, server.url)
    there = contents(server, "killed")
    del there[".pack.jsonl"]
    assert there == local_contents(folder, tmp_path)
