"""Checkpoints on S3: complete or absent despite all faults, and of one run only."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.support.finished import run_config
from tests.support.s3 import BUCKET, faulty, first_of, s3_server, some_of
from univitar_ds.config.load import dump_config
from univitar_ds.data.storage import retry
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import CheckpointError, StorageError
from univitar_ds.formats.checkpoint.store import CheckpointStore, store_of
from univitar_ds.formats.checkpoint_dir import read_manifest, verify
from univitar_ds.formats.run import find_checkpoint
from univitar_ds.training.checkpoint import saves
from univitar_ds.training.checkpoint.protocol import Content, Part, Retention, save_now, saving
from univitar_ds.training.checkpoint.s3_folder import S3Folder
from univitar_ds.training.checkpoint.saves import Saves
from univitar_ds.training.distributed.process_group import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TWO = Retention(2)
numbers = itertools.count()


@pytest.fixture(scope="module")
def server():
    with s3_server() as started:
        yield started


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(retry, "FIRST_GAP_S", 0.001)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def store_at(url, name=None, give_up_s=20.0) -> CheckpointStore:
    settings = StorageSettings(endpoint_url=url, idle_timeout_s=1.0, give_up_s=give_up_s)
    return CheckpointStore(f"s3://{BUCKET}/{name or f'runs{next(numbers)}/small'}", settings)


def key(store, name) -> str:
    return f"{store.url.removeprefix(f's3://{BUCKET}/')}/{name}"


def at(server, store) -> CheckpointStore:
    """The same place without the proxy."""
    return store_at(server.url, key(store, "").rstrip("/"))


def content(step) -> Content:
    parts = [Part("rank00000.safetensors", memoryview(f"tensors {step}".encode())), Part("state.json", b"{}")]
    return Content(parts, None, lambda shares: [Part("index.json", f"{step}".encode())], 20)


def save(run: Path, store: CheckpointStore, step: int, retention=TWO) -> None:
    save_now(saving(S3Folder(run, store, step, retention), content(step), ALONE), ALONE)


def go_on(jobs, result) -> None:
    while True:
        result = jobs.send(result)()


def assert_whole(store: CheckpointStore, step: int) -> None:
    assert store.latest() == f"step-{step:08d}"
    folder = store.copied(store.latest())
    verify(folder, read_manifest(folder))
    assert (folder / "rank00000.safetensors").read_text() == f"tensors {step}"
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json", "manifest.json", "rank00000.safetensors", "state.json",
    ]  # fmt: skip


def test_a_manifest_is_written_last_and_only_if_absent_and_latest_replaces_only_the_version_before(server, run):
    with faulty(server, lambda request: None) as proxy:
        store = store_at(proxy.url)
        for step in (1, 2):
            save(run, store, step)
            assert_whole(store, step)
        puts = [request for request in proxy.requests if request.method == "PUT"]
    names = [one.key.removeprefix(key(store, "")) for one in puts]
    assert names[3:5] == ["step-00000001/manifest.json", "latest"]
    assert names[8:] == ["step-00000002/manifest.json", "latest"]
    conditions = [(one.if_none_match, bool(one.if_match)) for one in puts if one.if_none_match or one.if_match]
    assert conditions == [("*", False), ("*", False), ("*", False), (None, True)]


def test_only_checkpoints_of_the_retention_are_kept_and_a_manifest_is_removed_first(server, run):
    with faulty(server, lambda request: None) as proxy:
        store = store_at(proxy.url)
        server.put(key(store, "step-00000002/notes.txt"), b"mine")
        server.put(key(store, "step-00000002-copy/manifest.json"), b"mine")
        for step in (1, 2, 3, 4):
            save(run, store, step, Retention(1, 3))
        gone = [one.key.removeprefix(key(store, "")) for one in proxy.requests if one.method == "DELETE"]
    assert at(server, store).complete() == ["step-00000003", "step-00000004"]
    assert gone[0] == "step-00000001/manifest.json"
    assert gone[4] == "step-00000002/manifest.json"
    kept = server.keys(key(store, ""))
    assert key(store, "step-00000002/notes.txt") in kept
    assert key(store, "step-00000002-copy/manifest.json") in kept
    assert not [name for name in kept if "step-00000001/" in name]


def test_the_best_checkpoint_is_kept_and_found_by_its_name_in_the_folder_of_the_run(server, run):
    place = f"s3://{BUCKET}/best{next(numbers)}"
    data = {"sources": [{"path": "nowhere"}], "s3": {"endpoint_url": server.url}}
    config = run_config(data=data, checkpoint={"folder": place})
    dump_config(config, run / "config.yaml")
    store = store_of(config)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
        save(run, store, step, Retention(1, best=best))
    assert store.complete() == ["step-00000002", "step-00000004"]
    assert server.get(key(store, "best")) == b"step-00000002\n"
    found, checkpoint = find_checkpoint(run / "checkpoints" / "best")
    assert (found, checkpoint.name) == (run, "step-00000002")
    verify(checkpoint, read_manifest(checkpoint))


def test_errors_of_the_store_change_nothing(server, run):
    faults = ["throttle", "refuse", "error", "reset", "lost", "drop", "cut", "flip"]
    with faulty(server, some_of(faults, 0.3, seed=5)) as proxy:
        store = store_at(proxy.url)
        for step in (1, 2, 3):
            save(run, store, step)
            assert_whole(store, step)
        assert len(proxy.faults) >= 5
    assert at(server, store).complete() == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["manifest.json", "latest"])
def test_a_lost_answer_to_a_conditional_write_is_no_conflict(server, run, name):
    with faulty(server, first_of("lost", only=lambda one: one.method == "PUT" and one.key.endswith(name))) as proxy:
        store = store_at(proxy.url)
        save(run, store, 1)
        assert proxy.faults["lost"] == 1
        assert_whole(store, 1)


@pytest.mark.parametrize("left", range(5))
def test_a_store_that_refuses_uploads_ends_the_save_with_an_error_and_the_last_one_is_complete(server, run, left):
    """`left`: uploads before the store refuses them."""
    store = store_at(server.url)
    save(run, store, 1)
    prefix, puts = key(store, "").rstrip("/"), itertools.count()
    refuses = lambda one: "status 403" if one.method == "PUT" and next(puts) >= left else None  # noqa: E731
    with faulty(server, refuses) as proxy, pytest.raises(StorageError) as caught:
        save(run, store_at(proxy.url, prefix), 2)
    assert "the checkpoint of step 2 was not saved: " in str(caught.value)
    assert "access was refused (the store answered 403" in str(caught.value)
    assert not caught.value.transient
    assert_whole(store, 1)
    save(run, store, 2)
    assert_whole(store, 2)


@pytest.mark.parametrize("left", range(5))
def test_a_save_is_repeated_after_an_outage_of_the_store_wherever_that_begins(server, run, monkeypatch, left):
    """`left`: uploads before the store answers no more; it is back when the save has failed."""
    monkeypatch.setattr(saves, "AGAIN_S", 0.01)
    store = store_at(server.url)
    save(run, store, 1)
    prefix, puts, events = key(store, "").rstrip("/"), itertools.count(), []
    silent = lambda one: "throttle" if one.method == "PUT" and next(puts) >= left and not events else None  # noqa: E731
    with faulty(server, silent) as proxy:
        target = S3Folder(run, store_at(proxy.url, prefix, give_up_s=0.3), 2, Retention(2))
        saver = Saves(ALONE, lambda _: None, asynchronous=False, failed=events.append)
        saver.begin(target, 2, lambda: content(2))
    (event,) = events
    assert (event["event"], event["complete"]) == ("save_failed", False)
    assert_whole(store, 2)


def test_two_runs_that_write_to_one_place_do_not_overwrite_each_other(server, run, tmp_path):
    store = store_at(server.url)
    save(run, store, 1)
    ours, theirs = (S3Folder(folder, store, step, Retention(2)) for folder, step in ((run, 2), (tmp_path, 3)))
    first, second = (saving(target, content(number), ALONE) for target, number in ((ours, 2), (theirs, 3)))
    job = next(second)
    entries = job()
    save_now(first, ALONE)
    with pytest.raises(StorageError, match="latest was changed by another program at the same time; let only one run"):
        go_on(second, entries)
    assert_whole(store, 2)


def test_a_folder_without_a_manifest_does_not_exist(server, run):
    store = store_at(server.url)
    assert store.latest() is None
    server.put(key(store, "step-00000009/rank00000.safetensors"), b"x")
    assert store.latest() is None
    save(run, store, 1)
    server.put(key(store, "latest"), b"step-00000009\n")
    assert_whole(store, 1)
    server.put(key(store, "latest"), b"\xff../../x\n")
    assert_whole(store, 1)


def test_a_changed_object_is_named_with_a_remedy(server, run, tmp_path):
    store = store_at(server.url)
    save(run, store, 1)
    server.put(key(store, "step-00000001/state.json"), b"[]")
    server.delete(key(store, "step-00000001/index.json"))
    stored = store.checkpoint("step-00000001", tmp_path)
    with pytest.raises(CheckpointError, match=r"state\.json has a different sha256 .*remove its manifest\.json"):
        stored.fetch("state.json")
    with pytest.raises(CheckpointError, match=r"step-00000001/index\.json is missing"):
        stored.fetch("index.json")
    with pytest.raises(CheckpointError, match="is not a file of this checkpoint"):
        stored.fetch("../../etc")
