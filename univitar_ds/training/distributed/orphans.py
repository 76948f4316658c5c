"""Ranks end with the process that started them, also after `kill -9`, which sends them no signal.

Every rank watches that process itself, so any process may be killed, in any order.
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
"""Environment variable of ranks that we start: the process that the user started, as `Process.text` gives it."""
_RUNNER = b"deepspeed"
"""Part of the command of DeepSpeed's parent processes, which do not end their child either."""
_LOOK_EVERY_S = 0.5
_SIGNAL_S = 1.0
"""The signal that ended the launcher may have been sent to this rank too, as when a terminal closes; then the rank
saves."""
_SAVE_S = 30.0
"""For a rank that was asked to stop before its launcher was gone; launchers wait as long."""


def end_with_launchers(stop: Stop) -> None:
    """From now on this rank ends when a process that started it is gone."""
    launchers = list(_launchers())
    if launchers:
        threading.Thread(target=_watch, args=(launchers, stop), name="launchers", daemon=True).start()


def _launchers() -> Iterator[Process]:
    """The processes that this rank must not outlive; not a shell or a user's script."""
    own = os.environ.get(STARTED_BY)
    if own is not None:
        yield Process.from_text(own)
    elif not any(name in os.environ for name in LAUNCHED):  # the parent starts and ends ranks
        return
    pid = os.getppid()
    while (process := Process.of(pid)) is not None:
        yield process
        pid = parent(pid)
        if own is not None or _RUNNER not in command(pid):
            return


def _watch(launchers: list[Process], stop: Stop) -> None:
    while all(process.alive for process in launchers):
        time.sleep(_LOOK_EVERY_S)
    time.sleep(_SIGNAL_S)
    if stop.requested:
        time.sleep(_SAVE_S)
    if os.environ.get("RANK", "0") == "0":
        say("the process that started the ranks is gone: leaving at once, the last checkpoint stays")
    os._exit(1)
