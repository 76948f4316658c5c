"""The lock of a run's folder, between real processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.progress import wait_until
from univitar_ds import identity, run_lock
from univitar_ds.errors import StorageError
from univitar_ds.processes import Process
from univitar_ds.run_lock import LockLost, RunLock, RunLocked, still_ours

JOBS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_ADDR",
        "MASTER_PORT")  # fmt: skip
HOLDER = """
import sys
from pathlib import Path
from univitar_ds.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    print(lock.word, flush=True)
    sys.stdin.readline()
    lock.check()
"""
CHILD = """
import os, sys
from pathlib import Path
from univitar_ds.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.join(os.environ["WORD"])
print("joined", flush=True)
sys.stdin.readline()
"""
RACER = """
import sys
from pathlib import Path
from univitar_ds.run_lock import RunLock, RunLocked
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.take()
    print("won", flush=True)
except RunLocked as error:
    print(f"lost: {error}", flush=True)
sys.stdin.readline()
lock.check()
"""


def environment(**variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in JOBS}
    return {**own, "PYTHONPATH": str(ROOT), **variables}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    for name in JOBS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started():
    """Starts a process that is ended with the test."""
    processes = []

    def start(code: str, folder: Path, **variables: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def aged(folder: Path, seconds: float) -> None:
    """The heartbeat is older by so much."""
    lock = max(folder.glob(".lock-0*"))
    then = lock.stat().st_mtime - seconds
    os.utime(lock, (then, then))


def record(folder: Path) -> dict:
    return json.loads(max(folder.glob(".lock-0*")).read_text())


def rewritten(folder: Path, **changes: object) -> None:
    max(folder.glob(".lock-0*")).write_text(json.dumps(record(folder) | changes))


def test_a_second_start_is_refused_with_host_process_and_job_of_the_first(started, tmp_path):
    holder = started(HOLDER, tmp_path, SLURM_JOB_ID="7042")
    holder.stdout.readline()
    with pytest.raises(RunLocked) as refused:
        RunLock(tmp_path).take()
    for part in (str(tmp_path), f"process {holder.pid} on host {identity.this_machine()['host']}", "Slurm job 7042"):
        assert part in str(refused.value)
    with pytest.raises(RunLocked):
        RunLock(tmp_path).refuse()
    holder.communicate("\n")
    assert holder.returncode == 0
    with RunLock(tmp_path) as lock:
        lock.take()
        lock.check()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(started, tmp_path, caplog):
    holder = started(HOLDER, tmp_path)
    holder.stdout.readline()
    holder.send_signal(signal.SIGKILL)
    while Process.of(holder.pid) is not None:  # a zombie is gone, too
        time.sleep(0.01)
    with RunLock(tmp_path) as lock:
        lock.take()
    assert f"is taken over: process {holder.pid} on host" in caplog.text
    assert "has ended" in caplog.text


def test_a_process_with_a_reused_id_is_not_the_same_process(started, tmp_path):
    holder = started(HOLDER, tmp_path)
    holder.stdout.readline()
    pid, start = record(tmp_path)["processes"][0]
    assert pid == holder.pid
    rewritten(tmp_path, processes=[[pid, start - 5]])
    with RunLock(tmp_path) as lock:
        lock.take()


@pytest.mark.parametrize("key", ["host", "boot", "namespace"])
def test_a_process_on_another_machine_is_judged_only_by_its_heartbeat(started, tmp_path, key):
    """Two containers may have one host name, and the same number means another process in each."""
    with RunLock(tmp_path) as lock:
        lock.take()
        rewritten(tmp_path, **{key: "elsewhere", "processes": [[2**22 + 1, 5]]})
        aged(tmp_path, 50)
        with pytest.raises(RunLocked, match=r"updated its lock 5[0-9] s ago"):
            RunLock(tmp_path).take()
        aged(tmp_path, 70)
        with RunLock(tmp_path) as second:
            second.take()


def test_the_heartbeat_is_compared_with_the_clock_of_the_file_system(tmp_path, monkeypatch):
    with RunLock(tmp_path) as lock:
        lock.take()
        monkeypatch.setattr(time, "time", lambda: 4e9)
        with pytest.raises(RunLocked, match="updated its lock 0 s ago"):
            RunLock(tmp_path).take()


def test_the_heartbeat_continues_while_the_lock_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.01)
    with RunLock(tmp_path) as lock:
        lock.take()
        path = max(tmp_path.glob(".lock-0*"))
        taken = path.stat().st_mtime
        aged(tmp_path, 1000)
        wait_until(lambda: path.stat().st_mtime >= taken, "the next heartbeat")


JOB = {
    "slurm": ({"SLURM_JOB_ID": "7"}, "SLURM_RESTART_COUNT"),
    "torchrun": ({"TORCHELASTIC_RUN_ID": "abc"}, "TORCHELASTIC_RESTART_COUNT"),
    "torchrun without a name": (
        {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}, "TORCHELASTIC_RESTART_COUNT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("job", JOB)
def test_the_same_job_started_again_takes_over_and_another_job_does_not(started, tmp_path, monkeypatch, caplog, job):
    variables, counter = JOB[job]
    holder = started(HOLDER, tmp_path, **variables, **{counter: "1"})
    holder.stdout.readline()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for refused in ("0", "1"):
        monkeypatch.setenv(counter, refused)
        assert not RunLock(tmp_path).continues()
        with pytest.raises(RunLocked):
            RunLock(tmp_path).take()
    monkeypatch.setenv(counter, "2")
    last = list(variables)[-1]
    monkeypatch.setenv(last, "other")
    with pytest.raises(RunLocked):
        RunLock(tmp_path).take()
    monkeypatch.setenv(last, variables[last])
    assert RunLock(tmp_path).continues()
    with RunLock(tmp_path) as lock:
        lock.take()
        assert "has restarted" in caplog.text
        holder.communicate("\n")
        assert holder.returncode == 1, "the first finds out before it writes"


def test_a_run_whose_lock_was_taken_over_stops_before_it_writes(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    still_ours(tmp_path)
    aged(tmp_path, 100)
    rewritten(tmp_path, host="elsewhere")
    aged(tmp_path, 100)
    second.take()
    with pytest.raises(LockLost, match=rf"taken over by another launch, process {os.getpid()} on host .* stops before"):
        first.check()
    second.check()
    first.release()
    second.check()
    with pytest.raises(RunLocked):
        RunLock(tmp_path).take()
    second.release()


def test_a_folder_without_its_lock_is_no_longer_ours(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.take()
        for path in tmp_path.glob(".lock-*"):
            path.unlink()
        with pytest.raises(LockLost):
            still_ours(tmp_path)


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path, monkeypatch, fault):
    with RunLock(tmp_path) as lock:
        lock.take()
        with monkeypatch.context() as broken:
            broken.setattr(run_lock, "open", lambda *_: _raise(OSError(fault, os.strerror(fault))), raising=False)
            with pytest.raises(StorageError, match="cannot be read") as raised:
                still_ours(tmp_path)
        assert raised.value.transient
        still_ours(tmp_path)


def _raise(error):
    raise error


@pytest.mark.parametrize("state", ["nothing", "released", "dead"])
def test_exactly_one_of_many_concurrent_processes_gets_the_lock(started, tmp_path, state):
    if state != "nothing":
        lock = RunLock(tmp_path)
        lock.take()
        if state == "released":
            lock.release()
        else:
            rewritten(tmp_path, processes=[[2**22 + 1, 5]])
    racers = [started(RACER, tmp_path) for _ in range(6)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline() for racer in racers]
    assert said.count("won\n") == 1
    winner = racers[said.index("won\n")]
    assert all(line == "won\n" or f"process {winner.pid} on host" in line for line in said)
    winner.communicate("\n")
    assert winner.returncode == 0, "the others have left it alone"


def test_a_lock_shared_with_a_child_lives_as_long_as_either(started, tmp_path):
    parent = started(HOLDER, tmp_path)
    word = parent.stdout.readline().strip()
    rank = started(CHILD, tmp_path, WORD=word)
    assert rank.stdout.readline() == "joined\n"
    parent.kill()
    parent.wait()
    with pytest.raises(RunLocked, match=f"processes {parent.pid} and {rank.pid} on host"):
        RunLock(tmp_path).take()
    rank.kill()
    rank.wait()
    with RunLock(tmp_path) as lock:
        lock.take()


def test_a_lock_that_is_being_written_is_held_until_it_is_old(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PAUSE_S", 0.001)
    (tmp_path / ".lock-00000001").touch()
    with pytest.raises(RunLocked, match="a launch that has just begun"):
        RunLock(tmp_path).take()
    aged(tmp_path, 70)
    with RunLock(tmp_path) as lock:
        lock.take()


def test_released_locks_leave_one_file(tmp_path):
    for _ in range(3):
        with RunLock(tmp_path) as lock:
            lock.take()
    assert [path.name for path in tmp_path.iterdir()] == [".lock-00000003"]
    RunLock(tmp_path).refuse()
