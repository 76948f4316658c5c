"""Limits of the machine, and locks in the folder of compiled operations."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from univitar_ds.doctor import operations
from univitar_ds.doctor.findings import FAILED, OK
from univitar_ds.doctor.limits import open_files, shared_memory


def test_shared_memory_has_to_have_room_for_the_ranks_of_a_node(tmp_path):
    free = os.statvfs(tmp_path)
    each = free.f_bavail * free.f_frsize
    assert shared_memory(8, each // 100, tmp_path).state == OK
    row = shared_memory(8, each, tmp_path)
    assert row.state == FAILED
    assert "are needed for 8 ranks" in row.found
    assert "--shm-size" in row.remedy


def test_a_machine_without_shared_memory_fails(tmp_path):
    row = shared_memory(1, 1, tmp_path / "absent")
    assert (row.state, row.remedy) == (FAILED, "mount a tmpfs there")


@pytest.mark.parametrize(("hard", "state"), [(1024, FAILED), (4095, FAILED), (4096, OK), (resource.RLIM_INFINITY, OK)])
def test_only_the_hard_limit_of_open_files_has_to_be_high(hard, state):
    row = open_files((1024, hard), 4096)
    assert row.state == state
    if state == FAILED:
        assert f"{hard:,} (hard), but 4,096 are needed" in row.found
        assert "LimitNOFILE of slurmd" in row.remedy


def built(folder: Path, name: str, *files: str) -> Path:
    (folder / name).mkdir(parents=True)
    for file in files:
        (folder / name / file).write_text("")
    return folder


def test_finished_and_unfinished_operations_are_listed(tmp_path):
    built(tmp_path, "cpu_adam", "build.ninja", "cpu_adam.so")
    built(tmp_path, "utils", "build.ninja")
    (row,) = operations.rows_of([tmp_path])
    assert row.state == OK
    assert f"no build holds a lock in {tmp_path}; compiled: cpu_adam; utils was not finished" in row.found


def test_a_lock_of_a_killed_build_fails_with_the_command_that_removes_it(tmp_path):
    lock = built(tmp_path, "utils", "lock") / "utils" / "lock"
    for path in (lock, lock.parent):
        os.utime(path, (1, 1))
    (row,) = operations.rows_of([tmp_path])
    assert row.state == FAILED
    assert "was left by a killed build" in row.found
    assert row.remedy == f"rm {lock}"
    assert lock.exists()


def test_a_lock_that_a_process_has_open_is_waited_for(tmp_path):
    lock = built(tmp_path, "utils", "lock") / "utils" / "lock"
    os.utime(lock, (1, 1))
    code = f"import sys\nfile = open({str(lock)!r})\nprint('up', flush=True)\nsys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as builder:
        builder.stdout.readline()
        (row,) = operations.rows_of([tmp_path])
        builder.stdin.close()
    assert row.state == FAILED
    assert f"process {builder.pid} is compiling" in row.found
    assert "wait for that build" in row.remedy


def test_the_first_folder_that_can_be_written_is_checked_and_none_is_made(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    (row,) = operations.rows_of([tmp_path / "a" / "b"])
    assert (row.state, sorted(tmp_path.iterdir())) == (OK, [file])
    (row,) = operations.rows_of([Path("/proc/nothing")])
    assert row.state == FAILED
    assert "TORCH_EXTENSIONS_DIR" in row.remedy
