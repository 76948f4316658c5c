"""How a command starts processes for its files, and what each of them does first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext

from univitar_ds.processes import SIGNALS, signals_held


def context(preload: Sequence[str]) -> ForkServerContext:
    """Starts processes that have these modules already and that leave Ctrl-C to this process, from their birth on."""
    started = get_context("forkserver")
    started.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # it takes care of itself, and would unblock the signals again
    with signals_held():  # the server would end by a traceback while it imports, and a process before it calls `begin`
        forkserver.ensure_running()
    return started


def begin() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a killed parent cannot stop a child that hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a pool ends its processes by SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
