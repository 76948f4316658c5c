"""Sends an error of one rank to all ranks, also to those that wait for it in a collective, which cannot be interrupted.

Otherwise they would wait for the timeout of the process group, ten minutes, unless a launcher ends them. A thread of
each rank checks once a second for a message in the store of the process group, through a connection of its own.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from univitar_ds.errors import UserError, first_line
from univitar_ds.run_lock import release_all
from univitar_ds.training.distributed.preemption import say
from univitar_ds.training.distributed.process_group import World, known_to_all

LOOK_S = 1.0
GRACE_S = 2.0
"""Seconds that the failing rank waits for the others to end. A rank that has read the error ends LOOK_S earlier, unless
it ends by itself before, for example with the same error."""
HEARD_S = 5.0
"""Maximum time that a rank with an error waits until the other ranks have read it."""
ANSWER_S = 60.0
"""Maximum time that a rank waits at its end for an answer of the store, which may take seconds on a busy machine."""
_FAULT, _HEARD = "fault", "heard"


@contextmanager
def ending_together(world: World) -> Iterator[None]:
    """Ends all ranks within seconds if the body raises on one of them. All ranks run the body.

    The rank that fails raises its error, after the others have read it. The others end with its exit code; rank 0
    prints the rank, its machine and the error. Errors that all ranks raise, as `all_ranks_or_none` does, are not sent.
    """
    if world.size == 1:
        yield
        return
    alarm = _Alarm(world)
    try:
        yield
    except Exception as error:
        alarm.stop_listening()
        if not known_to_all(error):
            alarm.ring(error)
        raise
    finally:
        alarm.stop()


class _Alarm:
    """Listens for the error of another rank until `stop`."""

    def __init__(self, world: World) -> None:
        self._world, self._stopped = world, threading.Event()
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("alarm", store)
        # A request holds the lock of its connection, and the main thread's requests wait for other ranks.
        self._listening = dist.PrefixStore("alarm", store.clone())
        self._thread = threading.Thread(target=self._listen, name="alarm", daemon=True)
        self._thread.start()

    def stop_listening(self) -> None:
        """From now on, an error of another rank does not end this one. Does not wait for the store."""
        self._stopped.set()

    def stop(self) -> None:
        """Ends the thread. A thread that is in a request of the store when the interpreter ends would abort the process
        ("terminate called without an active exception"), and exit code 134 would hide that of the rank."""
        self._stopped.set()
        self._thread.join(ANSWER_S)  # the machine of the store may be off

    def ring(self, error: Exception) -> None:
        """Sends an error to all ranks, and waits until they have read it and ended, at most HEARD_S + GRACE_S."""
        text, code = first_line(error), getattr(error, "exit_code", 1)
        if not isinstance(error, UserError):
            traceback.print_exception(error)  # now: a launcher ends this rank when the others have ended
            text = f"{type(error).__name__}: {text}"
        fault = {"rank": self._world.rank, "host": platform.node(), "text": text, "code": code}
        with suppress(dist.DistError):  # the store ends with rank 0
            self._store.compare_set(_FAULT, "", json.dumps(fault))
            self._store.add(_HEARD, 1)
            for _ in range(int(HEARD_S / 0.1)):
                if self._store.add(_HEARD, 0) >= self._world.size:
                    break
                time.sleep(0.1)
            time.sleep(GRACE_S)  # when this rank ends, collectives of the others fail with misleading errors

    def _listen(self) -> None:
        with suppress(dist.DistError):
            while not self._stopped.wait(LOOK_S):
                if self._listening.check([_FAULT]) and not self._stopped.is_set():  # else it may be the rank's own
                    self._listening.add(_HEARD, 1)
                    if not self._stopped.wait(GRACE_S - LOOK_S):
                        self._leave(json.loads(self._listening.get(_FAULT)))
                    return

    def _leave(self, fault: dict) -> None:
        if self._world.is_main:
            say(f"error: rank {fault['rank']} on {fault['host']} ended the run: {fault['text']}")
        release_all()
        os._exit(fault["code"])
