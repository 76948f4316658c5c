"""Objects with processes and threads can be closed at any point of their start, twice, and after a failed start."""

import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from tests.support.decoding import servers
from tests.support.open_files import open_below
from tests.support.progress import run_watched, wait_until
from univitar_ds.data.decoding.forkserver import ForkServer
from univitar_ds.data.decoding.pipeline import Pipeline, PipelineConfig
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.decoding.supervisor import Closed, RestartBudget, WorkerSupervisor
from univitar_ds.data.decoding.task_pool import Task, TaskPool
from univitar_ds.data.storage import shard_cache
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.storage.cache_dir import CacheDir, Version
from univitar_ds.data.storage.shard_cache import ShardCache
from univitar_ds.errors import DataError

PATIENCE_S = 60
"""Longest wait for an event; reached only if a test fails."""


class Gate:
    """Stops a thread in `pass_through`, which sets `reached` and waits for `opened`."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def pass_through(self):
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)


class Thread(threading.Thread):
    """Runs `target`; `result` returns what `target` returned or raised."""

    def __init__(self, target):
        super().__init__(daemon=True)
        self._body, self.outcome = target, None
        self.start()

    def run(self):
        try:
            self.outcome = self._body()
        except BaseException as error:
            self.outcome = error

    def result(self):
        self.join(PATIENCE_S)
        assert not self.is_alive(), "it hangs"
        return self.outcome


@pytest.fixture
def slots():
    slots = SharedSlots.create(2, 1 << 12)
    yield slots
    slots.close()


def closed(server):
    return Thread(server.close).result()


def test_close_during_the_start_of_the_process_waits_for_it_and_ends_it(monkeypatch, slots, started):
    gate, popen = Gate(), subprocess.Popen

    def slow(*given, **named):
        gate.pass_through()
        return popen(*given, **named)

    monkeypatch.setattr(subprocess, "Popen", slow)
    server = ForkServer(slots)
    asking = Thread(server.fork)
    assert gate.reached.wait(PATIENCE_S)
    closing = Thread(server.close)
    gate.opened.set()
    assert closing.result() is None
    assert isinstance(asking.result(), EOFError)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_close_wakes_a_thread_that_waits_for_a_process_that_never_becomes_ready(monkeypatch, slots, started):
    popen, idle = subprocess.Popen, [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(subprocess, "Popen", lambda command, **named: popen(idle, **named))
    server = ForkServer(slots)
    asking = Thread(server.fork)
    wait_until(lambda: started, "the process of the server")
    assert closed(server) is None
    assert isinstance(asking.result(), EOFError)
    assert started[0].poll() == -signal.SIGKILL


def test_close_works_while_another_thread_forgets_the_process_after_a_failed_start(monkeypatch, slots, started):
    """The other thread may do so between any two lines of `close`."""
    server = ForkServer(slots, ["image"])
    server.fork()
    (process,) = started
    gate, wait, waiting = Gate(), process.wait, []

    def slow(timeout=None):
        waiting.append(threading.current_thread())
        gate.pass_through()
        return wait(timeout)

    monkeypatch.setattr(process, "wait", slow)
    closing = Thread(server.close)
    assert gate.reached.wait(PATIENCE_S)
    asking = Thread(server.fork)  # finds the socket closed, and forgets the process
    wait_until(lambda: asking in waiting, "the thread that gives the process up")
    gate.opened.set()
    assert closing.result() is None
    assert isinstance(asking.result(), EOFError | OSError)
    assert process.poll() is not None


@pytest.mark.parametrize("times", [1, 3])
def test_close_does_nothing_if_repeated_or_after_a_failed_start(monkeypatch, slots, times):
    def failing(*given, **named):
        raise OSError(12, "Cannot allocate memory")

    server = ForkServer(slots)
    monkeypatch.setattr(subprocess, "Popen", failing)
    with pytest.raises(OSError, match="Cannot allocate"):
        server.fork()
    for _ in range(times):
        assert closed(server) is None
    monkeypatch.undo()
    with pytest.raises(EOFError):
        server.fork()
    assert not servers()


@pytest.mark.parametrize("turn", range(8))
def test_close_during_a_start_raises_nothing_in_either_thread(monkeypatch, slots, started, turn):
    """A run that ends at once because of its data closes the server during the start; tried at 8 points of it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        server = ForkServer(slots)
        outcomes = []

        def ask():
            for _ in range(3):
                try:
                    server.fork()[1].close()
                except (EOFError, OSError) as error:
                    outcomes.append(error)

        asking = Thread(ask)
        wait_until(lambda: started, "the process of the server")
        time.sleep(0.12 * turn)
        assert closed(server) is None
        assert asking.result() is None
    finally:
        sys.setswitchinterval(interval)
    assert all(process.poll() is not None for process in started)
    with pytest.raises(EOFError):
        server.fork()


def test_a_supervisor_that_is_stopped_while_it_ends_a_process_logs_no_failure(slots, caplog):
    class Ended:
        """A server whose process ends at once; the supervisor is stopped while it requests the exit code."""

        def fork(self):
            ours, theirs = socket.socketpair()
            theirs.close()
            return 1, multiprocessing.connection.Connection(ours.detach())

        def end(self, pid, *, hangs):
            supervisor.stop()

    supervisor = WorkerSupervisor(0, Ended(), slots, LOCAL, RestartBudget(0))
    with pytest.raises(Closed):
        supervisor.start()
    assert not caplog.records


def pipe_line(plans=(), **changed):
    config = PipelineConfig(**{"workers": 2, "prefetch_packs": 2, "slot_bytes": 588, "max_image_px": 10**6, **changed})
    return Pipeline(lambda probe: iter(plans), None, config)


def test_a_data_error_is_raised_while_decoding_processes_are_still_starting(started):
    def plans():
        raise DataError("none of the 1 shards has a readable image sample")
        yield

    for _ in range(4):
        with pytest.raises(DataError, match="none of the 1 shards"), pipe_line(plans()) as packs:
            next(packs)
    assert all(process.poll() is not None for process in started)


def test_a_thread_that_waits_for_a_pack_is_woken_when_another_thread_closes(monkeypatch):
    gate = Gate()

    def plans():
        gate.pass_through()
        yield from ()

    packs = pipe_line(plans())
    waiting = Thread(lambda: next(packs))
    assert gate.reached.wait(PATIENCE_S)
    closing = Thread(packs.close)
    outcome = waiting.result()
    gate.opened.set()
    assert isinstance(outcome, RuntimeError), outcome
    assert "closed" in str(outcome)
    assert closing.result() is None


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_pipeline_that_cannot_start_all_its_threads_ends_the_running_ones(monkeypatch, allowed):
    start, began = threading.Thread.start, []

    def limited(thread):
        if thread.name in ("planner", "decoder"):
            if len(began) == allowed:
                raise RuntimeError("can't start new thread")
            began.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pipe_line()
    for thread in began:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_pipeline_can_be_closed_by_one_of_its_own_threads():
    """The garbage collector may run `close` in any thread."""
    made, closing, others = threading.Event(), [], set(threading.enumerate())

    def plans():
        assert made.wait(PATIENCE_S)
        try:
            packs.close()
            closing.append(None)
        except BaseException as error:
            closing.append(error)
        yield from ()

    packs = pipe_line(plans())
    threads = set(threading.enumerate()) - others
    assert {thread.name for thread in threads} == {"planner", "decoder"}
    made.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert closing == [None]


def test_shared_slots_that_cannot_be_mapped_leave_no_file_open(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")  # a temporary file is used instead
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = SharedSlots.create(2, 4096)
    assert open_below(tmp_path)
    made.close()
    for size in (1 << 62, 1 << 50):
        with pytest.raises((OSError, OverflowError, ValueError)):
            SharedSlots.create(2, size)
    assert open_below(tmp_path) == []


VERSION = Version("s3://b/a.tar", "e", 4)


def test_a_download_whose_thread_cannot_start_can_be_tried_again(monkeypatch, tmp_path):
    cache = ShardCache(tmp_path / "copies", 1 << 20, lambda version, start, end: iter([memoryview(b"abcd")]), 20.0)

    def refused(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        cache.prefetch([VERSION])  # raises nothing; the reader that opens the shard gets the error
        with cache.open(VERSION) as stream, pytest.raises(RuntimeError, match="new thread"):
            stream.read()
    assert open_below(tmp_path) == []
    with cache.open(VERSION) as stream:
        assert Thread(stream.read).result() == b"abcd"


def test_readers_are_woken_by_a_finished_download_if_the_next_one_cannot_start(monkeypatch, tmp_path):
    gate = Gate()

    def failing(version, start, end):
        gate.pass_through()
        raise DataError("the store is gone")
        yield

    cache = ShardCache(tmp_path / "copies", 1 << 20, failing, 20.0)

    def broken(*_):
        raise ValueError("cannot start the next")

    monkeypatch.setattr(shard_cache, "AHEAD", 1)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    cache.prefetch([VERSION, Version("s3://b/next.tar", "e", 4)])
    monkeypatch.setattr(CacheDir, "whole", broken)
    stream = cache.open(VERSION)
    reading = Thread(stream.read)
    gate.opened.set()
    error = reading.result()
    stream.close()  # not earlier, because it would wait for a reader that hangs
    assert isinstance(error, DataError)
    assert "the store is gone" in str(error)


SESSIONS = """
import tempfile, threading, time
from univitar_ds.data.storage.session import session_folder

made, found, gate, mkdtemp = [], [], threading.Barrier(4), tempfile.mkdtemp

def slow(**options):
    made.append(mkdtemp(**options))
    time.sleep(0.05)
    return made[-1]

def ask():
    gate.wait()
    found.append(session_folder())

tempfile.mkdtemp = slow
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(made), len(found), len(set(found) | set(made)))
"""


def test_threads_that_call_session_folder_at_the_same_time_get_one_folder(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ran = run_watched([sys.executable, "-c", SESSIONS], env=environment, check=True)
    assert ran.stdout.split() == ["1", "4", "1"]


def nothing(task, report):
    """The work function of a task pool."""


def test_a_task_pool_whose_process_cannot_start_raises_and_leaves_no_pipe_open(monkeypatch):
    pipes = []

    def recorded(duplex=True):
        pipes.append(pipe(duplex))
        return pipes[-1]

    def refused(process):
        raise OSError(11, "Resource temporarily unavailable")

    pipe = multiprocessing.connection.Pipe
    monkeypatch.setattr(multiprocessing.connection, "Pipe", recorded)
    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refused)
    with pytest.raises(OSError, match="temporarily unavailable"), TaskPool(nothing, 1, 30.0) as pool:
        list(pool.run([Task(0, None)]))
    assert [[end.closed for end in ends] for ends in pipes] == [[True, True]]
