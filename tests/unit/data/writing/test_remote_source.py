"""Sources on S3 are packed like the same local files, however the store behaves."""

import json
import os
from collections import namedtuple

import pytest

from tests.support import datasets
from tests.support.datasets import image, lines, write
from tests.support.packing import contents, pack, samples_of
from tests.support.s3 import BUCKET, faulty, s3_server, some_of
from univitar_ds.data.shards.manifest import read_manifest
from univitar_ds.data.storage import retry
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.writing import remote_source, writer
from univitar_ds.data.writing.remote_source import find_source
from univitar_ds.errors import DataError, StorageError

SETS = {
    "webdataset": datasets.webdataset,
    "classes": datasets.class_folders,
    "tables": datasets.parquet_parts,
    "csv": lambda folder: datasets.table(folder, "csv"),
    "parquet": lambda folder: datasets.parquet_parts(folder) / "data/train-00000-of-00002.parquet",
    "coco": lambda folder: datasets.coco(folder).parents[1],
    "brace range": lambda folder: datasets.webdataset(folder) / "{000..001}.tar",
}


@pytest.fixture(scope="module")
def server():
    with s3_server() as started:
        yield started


@pytest.fixture(scope="module")
def where(server, tmp_path_factory):
    """Settings of the store, for tests without faults."""
    return settings(server.url, tmp_path_factory.mktemp("shared"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.001)


@pytest.fixture
def prefix(request):
    """Every test has its own part of the bucket."""
    return request.node.name.replace("[", "-").replace("]", "").replace(" ", "_")


def upload(server, folder, prefix) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"


def settings(url, tmp_path) -> StorageSettings:
    (tmp_path / "session").mkdir(exist_ok=True)
    return StorageSettings(url, idle_timeout_s=1.5, session=str(tmp_path / "session"))


def shards(out) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if not name.startswith(".")}


@pytest.mark.parametrize("name", SETS)
def test_a_source_gives_the_shards_of_the_same_local_files(server, where, tmp_path, prefix, name):
    source = SETS[name](tmp_path / "source")
    url = upload(server, tmp_path / "source", prefix)
    address = f"{url}/{source.relative_to(tmp_path / 'source').as_posix()}".removesuffix("/.")
    manifest = pack(address, tmp_path / "out", settings=where)
    assert manifest == pack(source, tmp_path / "local")
    assert manifest["skipped"] == []
    assert shards(tmp_path / "out") == shards(tmp_path / "local")
    assert {path.name for path in (tmp_path / "out").glob(".*")} == {".pack.jsonl", ".pack.lock"}


def test_every_object_is_fetched_once_and_a_finished_packing_fetches_none(server, where, tmp_path, prefix):
    url = upload(server, datasets.class_folders(tmp_path / "source"), prefix)

    def fetched(proxy) -> list[str]:
        done = [one.key.removeprefix(f"{prefix}/") for one in proxy.requests if one.method == "GET" and one.range]
        proxy.requests.clear()
        return sorted(done)

    with faulty(server, lambda request: None) as proxy:
        watched = settings(proxy.url, tmp_path)
        manifest = pack(url, tmp_path / "out", settings=watched)
        assert fetched(proxy) == ["train/cat/0.jpg", "train/dog/1.jpg", "val/cat/2.jpg"]
        assert pack(url, tmp_path / "out", settings=watched) == manifest
        assert fetched(proxy) == []
        server.put(f"{prefix}/train/cat/0.jpg", image(5))
        changed = pack(url, tmp_path / "out", settings=watched)
        assert len(fetched(proxy)) == 3
    assert samples_of(tmp_path / "out", changed)["train/cat/0.jpg"]["jpg"] == image(5)
    next((tmp_path / "out").glob("val-*.tar")).unlink()
    assert pack(url, tmp_path / "out", settings=where) == changed
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_a_copy_continues_after_an_interruption_and_through_errors_of_the_store(server, tmp_path, prefix, monkeypatch):
    url = upload(server, write(tmp_path / "source", {f"{'ab'[i % 2]}/{i}.jpg": image(i) for i in range(12)}), prefix)
    monkeypatch.setattr(remote_source, "_BATCH", 4)
    with faulty(server, some_of(["drop", "throttle", "reset", "short"], 0.4)) as proxy:
        where = settings(proxy.url, tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(remote_source, "at_once", stopping_after(8))
            with pytest.raises(KeyboardInterrupt):
                pack(url, tmp_path / "out", settings=where)
        before = {one.key for one in proxy.requests if one.method == "GET" and one.range}
        assert len(before) == 8
        proxy.requests.clear()
        server.delete(sorted(before)[0])  # its copy must not be packed
        manifest = pack(url, tmp_path / "out", settings=where)
        assert {one.key for one in proxy.requests if one.method == "GET" and one.range}.isdisjoint(before)
        assert proxy.faults
    assert manifest["counts"] == {"train": {"image": 11}}
    assert not (tmp_path / "out/.pack.source").exists()


def stopping_after(count):
    """`at_once` in this thread, interrupted before the file number `count`."""
    left = [count]

    def run(work, pieces, storages):
        for piece in pieces:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            yield work(piece)

    return run


def test_a_table_takes_only_the_files_that_it_names_below_its_folder(server, tmp_path, prefix):
    rows = [
        {"file": name, "caption": "x"} for name in ("a/0.jpg", "./a/1.jpg", "../out.jpg", "a/gone.jpg", "/etc/x.jpg")
    ]
    files = {f"in/a/{index}.jpg": image(index) for index in range(3)} | {"out.jpg": image(), "in/t.jsonl": lines(*rows)}
    url = upload(server, write(tmp_path / "source", files), prefix)
    with faulty(server, lambda request: None) as proxy:
        manifest = pack(f"{url}/in/t.jsonl", tmp_path / "out", settings=settings(proxy.url, tmp_path))
        got = {one.key.removeprefix(f"{prefix}/") for one in proxy.requests if one.method == "GET" and one.range}
    assert got == {"in/t.jsonl", "in/a/0.jpg", "in/a/1.jpg"}
    assert set(samples_of(tmp_path / "out", manifest)) == {"a/0.jpg", "a/1.jpg"}
    assert [one["file"] for one in manifest["skipped"]] == [f"t.jsonl, line {number}" for number in (3, 4, 5)]


def test_names_of_objects_that_are_no_paths_are_left_out(where, prefix, monkeypatch):
    names = ["a/0.jpg", "b/1.jpg", "a/../../up.jpg", "a//double.jpg", f"a/{'x' * 300}.jpg", "c.jpg", "c.jpg/d.jpg"]
    names += [".hidden/e.jpg", "a/note.pdf", "a/"]
    url = f"s3://{BUCKET}/{prefix}"
    listed = [(remote_source.Version(f"{url}/{name}", "e", 1), 0.0) for name in names]
    monkeypatch.setattr(type(storage_for(url, where)), "versions_below", lambda self, prefix: listed)
    found = find_source(url, where)
    assert [file.name for file in found.files] == ["a/0.jpg", "b/1.jpg", "c.jpg/d.jpg"]
    assert {name[:20]: reason.partition(":")[0] for name, reason in found.left_out.items()} == {
        "a/../../up.jpg": "unreadable",
        "a//double.jpg": "unreadable",
        f"a/{'x' * 18}": "unreadable",
        "c.jpg": "duplicate",
    }


def test_packing_from_s3_to_s3(server, where, tmp_path, prefix):
    url = upload(server, datasets.class_folders(tmp_path / "source"), f"{prefix}/raw")
    state = tmp_path / "state"
    out = f"s3://{BUCKET}/{prefix}/packed"
    manifest = pack(url, out, settings=where, state=state)
    assert read_manifest(out, storage_for(out, where)) == manifest
    assert manifest["counts"] == {"train": {"image": 2}, "val": {"image": 1}}
    assert pack(url, out, settings=where, state=state) == manifest
    assert {path.name for path in state.rglob("*") if path.is_file()} == {".pack.jsonl", ".pack.lock"}
    with pytest.raises(DataError, match=r"is inside .*, which is being packed"):
        pack(f"s3://{BUCKET}/{prefix}", out, settings=where, state=state)
    with pytest.raises(DataError, match="is packed already; a run reads it as it is"):
        pack(out, tmp_path / "out", settings=where)
    pack(datasets.labelled(tmp_path / "other"), tmp_path / "taken")
    with pytest.raises(DataError, match="holds shards packed from"):
        pack(url, tmp_path / "taken", settings=where)


def test_what_cannot_be_packed_is_refused_before_anything_is_written(server, where, tmp_path, prefix):
    server.put(f"{prefix}/note.pdf", b"x")
    url = f"s3://{BUCKET}/{prefix}"
    for source, message in (
        (url, "holds no image, video, table or tar; check the address"),
        (f"{url}/none", "holds no image, video, table or tar"),
        (f"{url}/none.tar", "there is no such object"),
        (f"{url}/{{0..1}}.tar", r"0\.tar: there is no such object"),
        (f"{url}/x.tar.gz", "is a compressed tar; decompress it first"),
    ):
        with pytest.raises(DataError, match=message):
            pack(source, tmp_path / "out", settings=where)
        assert not (tmp_path / "out").exists()


def test_errors_of_a_source_name_its_address(server, where, tmp_path, prefix, monkeypatch):
    server.put(f"{prefix}/t.csv", b"a,b\n1,2\n")
    server.put(f"{prefix}/coco.json", json.dumps({"images": [], "annotations": []}).encode())
    url = f"s3://{BUCKET}/{prefix}"
    with pytest.raises(DataError, match=f"^{url}/t.csv has the columns a, b; name the one"):
        pack(f"{url}/t.csv", tmp_path / "csv", settings=where)
    with pytest.raises(DataError, match=f"{url}/coco.json: is a JSON of COCO, whose images are elsewhere"):
        pack(f"{url}/coco.json", tmp_path / "coco", settings=where)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(remote_source.shutil, "disk_usage", lambda folder: usage(3))
    with pytest.raises(StorageError, match=r"t.csv: 0.0 GB are copied into .*, where 0.0 GB are free; pack into"):
        pack(f"{url}/t.csv", tmp_path / "full", settings=where)


def test_the_same_object_is_not_examined_again(server, where, tmp_path, prefix, monkeypatch):
    url = upload(server, datasets.class_folders(tmp_path / "source"), prefix)
    pack(url, tmp_path / "out", settings=where)
    server.put(f"{prefix}/train/dog/3.jpg", image(3))
    examined = []
    examine_all = writer.examine_all

    def noted(jobs, workers):
        examined.extend(jobs)
        return examine_all(jobs, workers)

    monkeypatch.setattr(writer, "examine_all", noted)
    assert pack(url, tmp_path / "out", settings=where)["counts"]["train"] == {"image": 3}
    assert [os.path.basename(job.path) for job in examined] == ["3.jpg"]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_object_that_changes_while_it_is_copied_is_an_error_and_the_next_call_continues(
    server, tmp_path, prefix, change
):
    url = upload(server, datasets.class_folders(tmp_path / "source"), prefix)
    key = f"{prefix}/train/dog/1.jpg"

    def plan(request):
        if request.method == "GET" and request.key == key and not changed:
            changed.append(server.put(key, image(7)) if change == "replaced" else server.delete(key))
        return None

    changed = []
    with faulty(server, plan) as proxy:
        where = settings(proxy.url, tmp_path)
        message = rf"^s3://{BUCKET}/{key}: the object was replaced or removed since .*; run the same command again when"
        with pytest.raises(DataError, match=message):
            pack(url, tmp_path / "out", settings=where)
        assert changed
        manifest = pack(url, tmp_path / "out", settings=where)
        again = [one.key for one in proxy.requests if one.method == "GET" and one.range]
    assert again.count(f"{prefix}/train/cat/0.jpg") == 1
    assert manifest["counts"]["train"] == {"image": 2 if change == "replaced" else 1}
    if change == "replaced":
        assert samples_of(tmp_path / "out", manifest)["train/dog/1.jpg"]["jpg"] == image(7)
