"""Recognition of real processes, also if a process id is reused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.progress import wait_until
from univitar_ds.processes import SIGNALS, Process, children, command, exits_by_signals, parent, signals_held

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_a_process_is_recognized_until_it_ends_even_as_a_zombie():
    started = subprocess.Popen(SLEEP)
    try:
        process = Process.of(started.pid)
        assert process.alive
        assert Process.from_text(process.text) == process
        assert parent(started.pid) == os.getpid()
        assert started.pid in children(os.getpid())
        wait_until(lambda: b"time.sleep(600)" in command(started.pid), "the command of the process")
    finally:
        started.kill()
    wait_until(lambda: not process.alive, "the end of the process")  # a zombie: its parent has not asked for it
    assert Process.of(started.pid) is None
    assert started.pid in children(os.getpid())
    started.wait()


def test_a_later_process_of_the_same_number_is_another():
    this = Process.of(os.getpid())
    assert this.alive
    assert not Process(this.pid, this.started - 1).alive


def test_an_unused_process_id_has_no_process():
    assert Process.of(2**31 - 1) is None
    assert (parent(2**31 - 1), command(2**31 - 1), children(2**31 - 1)) == (0, b"", [])


def test_signals_are_held_from_what_starts_inside_only():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with signals_held():
        started = subprocess.Popen(SLEEP)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    try:
        for number in SIGNALS:
            started.send_signal(number)
        status = Path(f"/proc/{started.pid}/status").read_text()
        blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        assert all(blocked >> (number - 1) & 1 for number in SIGNALS)
    finally:
        started.kill()
    assert started.wait() == -signal.SIGKILL


def test_a_signal_runs_what_the_body_has_to_end():
    ended = []

    def body():
        with exits_by_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(lambda: False, "the signal")
            finally:
                ended.append(True)

    with pytest.raises(SystemExit) as left:
        body()
    assert (left.value.code, ended) == (128 + signal.SIGTERM, [True])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_handled_already_keeps_its_handler():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with exits_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
