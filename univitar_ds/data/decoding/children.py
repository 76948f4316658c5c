"""Starts the worker processes of commands such as `data pack`."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext

from univitar_ds.processes import SIGNALS, signals_held


def context(preload: Sequence[str]) -> ForkServerContext:
    """Returns a context whose processes have the modules `preload` imported and ignore Ctrl-C from the start."""
    started = get_context("forkserver")
    started.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # before `signals_held`, because starting it unblocks the signals
    with signals_held():  # Ctrl-C would end the server during its imports, or a process before it calls `begin`
        forkserver.ensure_running()
    return started


def begin() -> None:
    """Initializes a process, which ignores Ctrl-C and exits when the parent exits or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # multiprocessing ends daemon processes with SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
