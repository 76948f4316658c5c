"""Saves during training on one rank, with a target whose writing waits for the test."""

import errno
import io
import logging
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tests.support.progress import wait_until
from univitar_ds.errors import CheckpointError, StorageError
from univitar_ds.formats import checkpoint_dir
from univitar_ds.training.checkpoint import saves as saves_module
from univitar_ds.training.checkpoint.atomic_dir import LocalFolder
from univitar_ds.training.checkpoint.protocol import Content, Entry, Part, Retention, Target
from univitar_ds.training.checkpoint.saves import Saves
from univitar_ds.training.distributed import process_group
from univitar_ds.training.distributed.process_group import PeerFailure, World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
PIECES = 3
"""Of a save: writing, reading back, publishing."""


class Slow(Target):
    """Writes when `may_write` is set; `fails` names the method that fails, the first `passes_after` times in a way
    that may pass."""

    def __init__(self, fails=None, passes_after=0):
        super().__init__()
        self.calls, self.threads, self.fails, self.may_write = [], set(), fails, threading.Event()
        self.passes_after, self.failures = passes_after, 0

    def _note(self, name):
        self.calls.append(name)
        self.threads.add(threading.current_thread())
        if self.fails == name and (not self.passes_after or self.failures < self.passes_after):
            self.failures += 1
            error = StorageError(f"the disk fails in {name}")
            error.transient = self.passes_after > 0
            raise error

    @property
    def place(self):
        return "nowhere"

    def begin(self, needed):
        self._note("begin")

    def put(self, part):
        while not self.may_write.is_set():
            self.check_wanted()
            time.sleep(0.001)
        self._note(f"put {part.name}")
        return Entry(part.name, 0, len(part.content), "hash")

    def check(self, entries):
        self._note(f"check {','.join(entry.name for entry in entries)}")

    def publish(self, entries):
        self._note(f"publish {','.join(entry.name for entry in entries)}")

    def clear(self):
        self._note("clear")


WHOLE = ["begin", "put tensors", "check tensors", "put index", "check index", "publish tensors,index"]


def content():
    return Content([Part("tensors", b"123")], "share", lambda shares: [Part("index", shares[0].encode())], 3)


@pytest.fixture
def completed():
    return []


@pytest.fixture
def saves(completed):
    return Saves(ALONE, completed.append, asynchronous=True)


def step(saves):
    """What a step of the training does: whether a save went on."""
    saves.raise_failed()
    if saves.ready():
        saves.advance()
        return True
    return False


def test_training_continues_while_a_thread_writes_and_a_later_step_completes_the_save(saves, completed):
    target = Slow()
    saves.begin(target, 4, content)
    assert not step(saves)
    assert target.calls == ["begin"]
    target.may_write.set()
    for _ in range(PIECES):
        assert completed == []
        wait_until(saves.ready, "a piece of the save")
        assert step(saves)
    assert completed == [target]
    assert target.calls == WHOLE
    assert threading.current_thread() not in target.threads
    assert not saves.ready()


def test_not_asynchronous_it_is_complete_when_it_returns(completed):
    target = Slow()
    target.may_write.set()
    Saves(ALONE, completed.append, asynchronous=False).begin(target, 4, content)
    assert (completed, target.calls) == ([target], WHOLE)
    assert target.threads == {threading.current_thread()}


def test_a_second_save_copies_the_state_when_the_first_is_complete_and_reports_the_wait(saves, completed, caplog):
    first, second = Slow(), Slow()
    second.may_write.set()
    saves.begin(first, 4, content)
    first.may_write.set()
    found = []
    with caplog.at_level(logging.INFO):
        saves.begin(second, 8, lambda: found.append(list(completed)) or content())
    assert found == [[first]], "the memory of the copy is free"
    assert "the checkpoint of step 4 is still being written, the one of step 8 waits for it" in caplog.text
    saves.finish()
    assert completed == [first, second]


def run(saves, target, error=None):
    """A run that begins a save, and ends in it if there is an `error`, else when the save is complete."""
    with saves.settled():
        saves.begin(target, 4, content)
        if error is not None:
            raise error
        while not step(saves) or saves.in_flight:
            time.sleep(0.001)


@pytest.mark.parametrize("piece", ["begin", "put tensors", "check tensors", "put index", "publish tensors,index"])
def test_a_failure_ends_the_run_with_its_message_and_removes_the_written_files(saves, completed, piece):
    target = Slow(fails=piece)
    target.may_write.set()
    with pytest.raises(StorageError, match=f"the disk fails in {piece}"):
        run(saves, target)
    assert completed == []
    assert target.calls[-1] == "clear"


def test_an_error_of_all_ranks_ends_the_run_when_the_save_is_complete(saves, completed):
    target = Slow()
    target.may_write.set()
    with pytest.raises(CheckpointError, match="of the run"):
        run(saves, target, CheckpointError("of the run"))
    assert completed == [target]


def test_the_error_of_the_run_is_raised_and_not_that_of_the_save(saves, caplog):
    target = Slow(fails="check tensors")
    target.may_write.set()
    with pytest.raises(PeerFailure, match="rank 3"):
        run(saves, target, PeerFailure("rank 3 ended the run"))
    assert "the checkpoint in flight was not completed: the disk fails in check tensors" in caplog.text


def test_a_rank_that_fails_alone_waits_for_no_disk_and_its_thread_stops_writing(completed, monkeypatch):
    monkeypatch.setattr(process_group, "dist", SimpleNamespace(all_reduce=lambda flags: None))
    saves, target = Saves(World(0, 2, 0, torch.device("cpu")), completed.append, asynchronous=True), Slow()
    with pytest.raises(CheckpointError, match="of this rank"):
        run(saves, target, CheckpointError("of this rank"))
    wait_until(lambda: "checkpoint" not in names(), "the end of the thread")
    assert target.calls == ["begin"]
    assert completed == []


@pytest.fixture
def events(monkeypatch):
    monkeypatch.setattr(saves_module, "AGAIN_S", 0.01)
    return []


def again(step, reason):
    return {
        "event": "save_failed", "checkpoint": step, "rank": 0, "reason": reason, "complete": False,
        "again_after_s": 0.01,
    }  # fmt: skip


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("piece", ["begin", "put tensors", "check tensors", "put index", "publish tensors,index"])
def test_a_failure_that_passes_writes_the_same_checkpoint_again_as_a_whole(completed, events, piece, asynchronous):
    target = Slow(fails=piece, passes_after=1)
    target.may_write.set()
    copies = []
    saves = Saves(ALONE, completed.append, asynchronous=asynchronous, failed=events.append)
    saves.begin(target, 4, lambda: copies.append(4) or content())
    saves.finish()
    assert events == [again(4, f"the disk fails in {piece}")]
    assert (completed, copies) == ([target], [4])
    place = WHOLE.index(piece)
    assert target.calls == WHOLE[: place + 1] + WHOLE
    other = Slow(fails="begin", passes_after=1)
    other.may_write.set()
    saves.begin(other, 8, content)
    saves.finish()
    assert events[1:] == [again(8, "the disk fails in begin")], "each save has a second attempt"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_lasting_failure_ends_the_run_with_an_error_after_the_second_try(completed, events, asynchronous):
    target = Slow(fails="put tensors", passes_after=2)
    target.may_write.set()
    saves = Saves(ALONE, completed.append, asynchronous=asynchronous, failed=events.append)
    with pytest.raises(StorageError, match=r"fails in put tensors; the save was repeated once, 0\.01 s after it had"):
        run(saves, target)
    assert (completed, len(events), target.calls[-1]) == ([], 1, "clear")


def test_the_training_continues_between_the_attempts_and_a_run_that_ends_there_does_not_wait(saves, completed, events):
    saves_module.AGAIN_S = 3600.0
    target = Slow(fails="put tensors", passes_after=1)
    target.may_write.set()

    def training():
        with saves.settled():
            saves.begin(target, 4, content)
            wait_until(saves.ready, "the failure")
            assert step(saves)
            assert not step(saves)
            saves._world = World(0, 2, 0, torch.device("cpu"))  # this rank ends alone
            raise CheckpointError("of this rank")

    with pytest.raises(CheckpointError, match="of this rank"):
        training()
    wait_until(lambda: "checkpoint" not in names(), "the end of the thread")
    assert completed == []


class Published(Slow):
    def publish(self, entries):
        self.published = True
        super().publish(entries)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_complete_checkpoint_is_not_written_again_if_outdated_ones_cannot_be_removed(completed, events, asynchronous):
    target = Published(fails=WHOLE[-1], passes_after=1)
    target.may_write.set()
    saves = Saves(ALONE, completed.append, asynchronous=asynchronous, failed=events.append)
    saves.begin(target, 4, content)
    saves.finish()
    assert (completed, target.calls) == ([target], WHOLE)
    (event,) = events
    assert (event["complete"], "again_after_s" in event) == (True, False)


class FailingOnce:
    """Makes the call number `count` that the system gets about a file below `folder` fail with an I/O error."""

    NAMES = ("open", "pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "scandir", "listdir", "stat",
             "read", "readlink")  # fmt: skip

    def __init__(self, folder, monkeypatch):
        self.folder, self.left, self.place = str(folder), 0, os.readlink
        for module, name in [(os, name) for name in self.NAMES] + [(io, "open")]:
            real = getattr(module, name)
            # Without waiting for the disk: no power fails here.
            monkeypatch.setattr(module, name, self._wrapped((lambda _: None) if name == "fsync" else real))

    def _wrapped(self, real):
        def call(*given, **named):
            if self.left and self._concerns(given[0]):
                self.left -= 1
                if not self.left:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*given, **named)

        return call

    def _concerns(self, place):
        path = self.place(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
        return path.startswith(self.folder)


def test_a_save_is_complete_wherever_the_disk_fails_once_and_the_next_one_removes_what_is_left(tmp_path, monkeypatch):
    def files():
        return Content([Part("rank00000.safetensors", b"123")], None, lambda _: [Part("index.json", b"{}")], 5)

    monkeypatch.setattr(saves_module, "AGAIN_S", 0.0)
    failing, count, unused, seen = FailingOnce(tmp_path, monkeypatch), 0, 0, set()
    while not unused:  # else the save had no call left that could fail
        count += 1
        root, events = tmp_path / str(count) / "checkpoints", []
        for number in (1, 2, 3, 4, 5):
            saves = Saves(ALONE, lambda target: None, asynchronous=False, failed=events.append)
            failing.left = count if number == 4 else 0
            saves.begin(LocalFolder(root, number, Retention(2)), number, files)
            saves.finish()
            unused, failing.left = unused + failing.left, 0
            last = checkpoint_dir.latest(root)
            checkpoint_dir.verify(last, checkpoint_dir.read_manifest(last))
            assert last.name == f"step-{number:08d}"
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004", "step-00000005"]
        seen.add(tuple(event["complete"] for event in events))
    assert seen == {(False,), (True,), ()}, "written again; complete but for outdated ones; no error of the save"
    assert count > 30, "few calls were made to fail"


def names():
    return [thread.name for thread in threading.enumerate()]
