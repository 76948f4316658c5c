"""Settings of all tests, and a watch that ends a test without progress."""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Generator
from typing import Any

import pytest
import pytest_timeout
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")  # before its import, so that its asserts also hold under `python -O`

from tests.support.progress import IDLE_S, LOOK_S, Stalled, Watch  # noqa: E402

os.environ["DS_ACCELERATOR"] = "cpu"  # runs of tests train on the CPU; tests of the kernels detect a GPU themselves

# Speed is measured in benchmarks/. A property must not fail because the machine is busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

TEST_IDLE_S = 1.5 * IDLE_S  # longer than for the waits in a test, whose errors name what they wait for
STOP = pytest.StashKey[threading.Event]()


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item) -> Generator[None, Any, Any]:
    """Also ends a test when none of its processes makes progress. pytest-timeout ends it after half an hour."""
    done = yield
    overdue, stop, stalls = signal.getsignal(signal.SIGALRM), threading.Event(), []

    def ring(number: int, frame: Any) -> None:
        if not stalls:
            overdue(number, frame)
        elif not pytest_timeout.is_debugging():
            faulthandler.dump_traceback(sys.__stderr__)
            pytest.fail(stalls[0])

    def look() -> None:
        watch = Watch(item.nodeid, {"its processes": os.getpid()}, idle_s=TEST_IDLE_S, heartbeat=lambda: Watch.beats)
        while not stop.wait(2 * LOOK_S):
            try:
                watch.check()
            except Stalled as stalled:
                stalls.append(str(stalled))
                return signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    if callable(overdue):  # false in the thread of a debugger
        signal.signal(signal.SIGALRM, ring)
        threading.Thread(target=look, daemon=True, name="watch of the test").start()
    item.stash[STOP] = stop
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    """Ends the watch of a test that is over."""
    if STOP in item.stash:
        item.stash[STOP].set()
