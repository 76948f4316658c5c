"""Ends a rank when the process that started it has ended, also after `kill -9`, which sends no signal to the ranks.

Every rank watches its launchers itself, so any process may be killed, in any order.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

from univitar_ds.processes import Process, command, parent
from univitar_ds.training.distributed.launchers import LAUNCHED
from univitar_ds.training.distributed.preemption import Stop, say

STARTED_BY = "UNIVITAR_DS_STARTED_BY"
"""Variable in the ranks that `univitar-ds` starts, with the `Process.text` of the process that the user started."""
_RUNNER = b"deepspeed"
"""Part of the command line of DeepSpeed's launcher processes, which do not end their child processes either."""
_POLL_S = 0.5
_SIGNAL_S = 1.0
"""Seconds in which a signal to the launcher may also reach this rank (a terminal that closes); the rank then saves."""
_SAVE_S = 30.0
"""Seconds in which a rank that was asked to stop may save after its launcher has ended; launchers wait as long."""


def end_with_launchers(stop: Stop) -> None:
    """Starts a thread that ends this rank after a process that started it has ended."""
    launchers = list(_launchers())
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="launchers", daemon=True).start()


def _launchers() -> Iterator[Process]:
    """Yields the processes that this rank must not outlive: launchers, but no shell or script of the user."""
    own = os.environ.get(STARTED_BY)
    if own is not None:
        yield Process.from_text(own)
    elif not any(name in os.environ for name in LAUNCHED):  # the parent is a shell, a script or srun
        return
    pid = os.getppid()
    while (process := Process.of(pid)) is not None:
        yield process
        pid = parent(pid)
        if own is not None or _RUNNER not in command(pid):
            return


def _watch(launchers: list[Process], stop: Stop) -> None:
    while all(process.alive for process in launchers):
        time.sleep(_POLL_S)
    time.sleep(_SIGNAL_S)
    if stop.requested:
        time.sleep(_SAVE_S)
    if os.environ.get("RANK", "0") == "0":
        say("the process that started the ranks has ended: exiting immediately, the last checkpoint stays")
    os._exit(1)
