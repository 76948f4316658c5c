import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from univitar_ds import atomic_write, owned
from univitar_ds.errors import CheckpointError, StorageError, writing
from univitar_ds.formats import checkpoint_dir
from univitar_ds.training.checkpoint import atomic_dir, protocol, saves
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.protocol import Content, Part, Retention, save_now, saving
from univitar_ds.training.distributed.process_group import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """Processes are killed here, machines are not."""
    monkeypatch.setattr(atomic_write.os, "fsync", lambda _: None)


def two(content: str) -> Content:
    names = ("rank00000.json", "rank00000.safetensors")
    parts = [Part(name, f"{content} {name}".encode()) for name in names]
    return Content(parts, None, lambda shares: [], sum(len(part.content) for part in parts))


def save(root: Path, step: int, keep: int = 2, target: type[LocalFolder] = LocalFolder) -> Path:
    place = target(root, step, Retention(keep))
    save_now(saving(place, two(str(step)), ALONE), ALONE)
    return place.folder


def test_the_best_checkpoint_is_kept_and_named_after_any_later_ones(tmp_path):
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save_now(saving(LocalFolder(tmp_path, step, Retention(1, best=best)), two(str(step)), ALONE), ALONE)
        names = {folder.name for folder in checkpoint_dir.complete(tmp_path)}
        assert names == {f"step-{kept:08d}" for kept in {step, best or step}}
        assert checkpoint_dir.named_in(tmp_path / "best") == (None if best is None else f"step-{best:08d}")
        assert checkpoint_dir.latest(tmp_path).name == f"step-{step:08d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "latest", "step-00000005", "step-00000006"]


def test_a_best_checkpoint_that_no_longer_exists_is_not_named(tmp_path):
    save_now(saving(LocalFolder(tmp_path, 3, Retention(1, best=2)), two("3"), ALONE), ALONE)
    assert not (tmp_path / "best").exists()


def assert_whole(folder: Path, step: int) -> None:
    manifest = checkpoint_dir.read_manifest(folder)
    assert sorted(manifest) == ["rank00000.json", "rank00000.safetensors"]
    checkpoint_dir.verify(folder, manifest)
    assert (folder / "rank00000.json").read_text() == f"{step} rank00000.json"


def test_a_commit_is_complete_named_by_latest_and_leaves_nothing_else(tmp_path):
    folder = save(tmp_path, 7)
    assert folder == checkpoint_dir.latest(tmp_path) == tmp_path / "step-00000007"
    assert_whole(folder, 7)
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert [folder.name for folder in checkpoint_dir.complete(tmp_path)] == ["step-00000003", "step-00000010"]


def test_checkpoints_of_every_nth_step_are_never_removed():
    steps = [10, 20, 30, 40, 50, 60, 130]
    assert Retention(2).outdated(steps) == [10, 20, 30, 40, 50]
    assert Retention(2, 30).outdated(steps) == [10, 20, 40, 50]
    assert Retention(7, 30).outdated(steps) == []


def test_steps_beyond_eight_digits_come_last(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(tmp_path, step)
    assert [folder.name for folder in checkpoint_dir.complete(tmp_path)] == ["step-100000000", "step-100000001"]


def test_a_disk_with_too_little_space_is_named_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(atomic_dir.shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    place = LocalFolder(tmp_path, 2, Retention(5))
    content = two("2")._replace(needed=41_000_000)
    message = r"3\.0 MB are free there, and the checkpoint of step 2 takes 41\.0 MB; free some .*checkpoint\.keep \(5\)"
    with pytest.raises(StorageError, match=message):
        save_now(saving(place, content, ALONE), ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


def killed_at_line(root: Path, step: int, line: int) -> bool:
    """Saves in a forked process, killed at its `line`-th line of commit.py or of removing folders; whether it was."""
    pid = os.fork()
    if pid == 0:
        left = [line]

        def trace(frame, event, _):
            if frame.f_code.co_filename not in (
                atomic_dir.__file__, atomic_write.__file__, owned.__file__, protocol.__file__,
            ):  # fmt: skip
                return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save(root, step)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_line_leaves_a_complete_checkpoint_and_the_next_save_works(tmp_path):
    outcomes = set()
    line = 0
    killed = True
    while killed:
        line += 1
        root = tmp_path / str(line)
        save(root, 1)
        save(root, 2)
        killed = killed_at_line(root, 3, line)
        found = checkpoint_dir.latest(root)
        step = int(found.name.removeprefix("step-"))
        assert_whole(found, step)
        outcomes.add(step)
        save(root, 3)
        assert_whole(checkpoint_dir.latest(root), 3)
        assert [p.name for p in sorted(root.iterdir())] == ["latest", "step-00000002", "step-00000003"]
    assert outcomes == {2, 3}
    assert line > 50, "the trace saw hardly anything"


def test_a_kill_during_the_first_save_leaves_no_checkpoint_or_a_complete_one(tmp_path):
    line, killed = 0, True
    while killed:
        line += 1
        root = tmp_path / str(line)
        killed = killed_at_line(root, 1, line)
        if found := checkpoint_dir.latest(root):
            assert_whole(found, 1)


def test_a_truncated_changed_or_missing_file_is_named_with_a_remedy(tmp_path):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / "rank00000.json").write_text("2")
    (folder / "rank00000.safetensors").write_text("3 rank00000.safetensors")
    with pytest.raises(CheckpointError) as caught:
        checkpoint_dir.verify(folder, checkpoint_dir.read_manifest(folder))
    for part in (
        "rank00000.json has 1 bytes instead of 16",
        "rank00000.safetensors has a different sha256",
        str(tmp_path / "step-00000001"),
    ):
        assert part in str(caught.value)
    (folder / "rank00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank00000\.safetensors is missing"):
        checkpoint_dir.verify(folder, checkpoint_dir.read_manifest(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 3}}', '{"files": [1]}'])
def test_an_invalid_manifest_is_one_error_message(tmp_path, content):
    folder = save(tmp_path, 1)
    (folder / checkpoint_dir.MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"no readable manifest\.json"):
        checkpoint_dir.read_manifest(folder)


def test_without_the_folder_that_latest_names_the_newest_complete_one_counts(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").write_text("step-00000009\n")
    assert checkpoint_dir.latest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "latest").write_text("")
    assert checkpoint_dir.latest(tmp_path) == tmp_path / "step-00000002"
    assert checkpoint_dir.latest(tmp_path / "nothing") is None


def test_a_write_that_fails_changes_nothing_and_its_reason_is_reported(tmp_path):
    save(tmp_path, 1)

    class Full(LocalFolder):
        def put(self, part):
            with writing(self.folder):
                raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"step-00000002 cannot be written: No space left on device; free some"):
        save(tmp_path, 2, target=Full)
    assert checkpoint_dir.latest(tmp_path) == tmp_path / "step-00000001"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_a_file_that_changes_after_it_was_written_is_noticed_before_it_counts(tmp_path):
    class Rotting(LocalFolder):
        def put(self, part):
            entry = super().put(part)
            (tmp_path / ".tmp-step-00000001" / part.name).write_text("rot")
            return entry

    with pytest.raises(CheckpointError, match=r"json has 3 bytes instead of 16.*all ranks share it") as caught:
        save(tmp_path, 1, target=Rotting)
    assert caught.value.transient
    assert checkpoint_dir.latest(tmp_path) is None


def test_a_failing_disk_and_a_full_disk_have_different_errors(tmp_path, monkeypatch):
    for fault, passes in [(5, True), (116, True), (28, False), (13, False)]:

        class Failing(LocalFolder):
            def check(self, entries, fault=fault):
                monkeypatch.setattr(atomic_dir, "part_faults", lambda *_: fails(fault))
                super().check(entries)

        with pytest.raises(StorageError, match=r"\.tmp-step-00000001 cannot be read: ") as found:
            save(tmp_path, 1, target=Failing)
        assert found.value.transient == passes


def test_a_checkpoint_counts_although_the_outdated_one_cannot_be_removed_and_the_next_save_removes_it(
    tmp_path, monkeypatch
):
    events, completed = [], []
    saver = saves.Saves(ALONE, completed.append, asynchronous=False, failed=events.append)
    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(atomic_dir, "_remove", lambda folder: fails(5))
        saver.begin(LocalFolder(tmp_path, 2, Retention(1)), 2, lambda: two("2"))
    (event,) = events
    assert (event["checkpoint"], event["complete"], len(completed)) == (2, True, 1)
    assert checkpoint_dir.latest(tmp_path) == tmp_path / "step-00000002"
    saver.begin(LocalFolder(tmp_path, 3, Retention(1)), 3, lambda: two("3"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003"]


def fails(fault):
    raise OSError(fault, os.strerror(fault))


def test_the_manifest_has_sizes_and_hashes(tmp_path):
    folder = save(tmp_path, 1)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files["rank00000.json"]["bytes"] == 16
    assert len(files["rank00000.json"]["sha256"]) == 64


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [".tmp-notes.txt", ".tmp-thesis/chapter.txt", "step-by-step/manifest.json", "step-00000001/notes.txt",
     ".tmp-gone-step-00000001/notes.txt", "notes.txt"],
)  # fmt: skip
def test_files_of_the_user_among_checkpoints_survive_every_save(tmp_path, name):
    save(tmp_path, 1)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for step in (2, 3, 4):
        save(tmp_path, step, keep=1)
    assert "mine" in _content(tmp_path).values()
    names = [folder.name for folder in checkpoint_dir.complete(tmp_path)]
    assert [name for name in names if name != "step-by-step"] == ["step-00000004"]
    assert not (tmp_path / "step-00000001" / "rank00000.json").exists()


def test_a_file_of_the_user_where_a_checkpoint_is_written_is_named(tmp_path):
    left = tmp_path / ".tmp-step-00000002"
    left.mkdir()
    (left / "rank00000.json").write_text("left by a crash")
    (left / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.txt.* move that file elsewhere"):
        save(tmp_path, 2)
    assert (left / "thesis.txt").read_text() == "mine"


def test_checkpoints_behind_links_are_read_and_never_removed(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    save(root, 1)
    (root / "step-00000001").rename(elsewhere)
    (root / "step-00000001").symlink_to(elsewhere)
    (root / ".tmp-step-00000009").symlink_to(elsewhere)
    before = _content(elsewhere)
    assert checkpoint_dir.latest(root) == root / "step-00000001"
    for step in (2, 3):
        save(root, step, keep=1)
    assert _content(elsewhere) == before
