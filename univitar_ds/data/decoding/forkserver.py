"""Starts and ends decoding processes from the trainer. The server's own code is in `worker`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import Connection

from univitar_ds.data.decoding import worker
from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.import_path import safe_environment
from univitar_ds.processes import signals_held

_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2 << 20), "MALLOC_TRIM_THRESHOLD_": str(6 << 20)}
"""glibc settings for decoding processes: they return memory of large images to the system at once and keep at most
6 MiB. By default glibc would keep twice the size of the largest image; lower values cost page faults."""
_ANSWER_S = 120.0
"""Maximum seconds to wait for an answer from the server."""
CLOSE_S = 10.0
"""Seconds after which `close` kills the server."""


class ForkServer:
    """A server process that forks decoding processes, which write into `slots`. Thread-safe.

    A thread holds `_talk` while it starts the server or waits up to `_ANSWER_S` for an answer. `_state` protects the
    four fields assigned after it and is held only briefly, so `close` can end the server at any time and thereby wake
    the waiting thread. Once `_closed` is set, no process is started.
    """

    def __init__(self, slots: SharedSlots, needs: Collection[worker.Need] = ("image", "video")) -> None:
        """The server starts at the first `fork`. `needs`: keys of `worker.PRELOADED`; their modules are preloaded."""
        self._slots = slots
        self._needs = sorted(needs)
        self._talk = threading.RLock()  # reentrant: garbage collection may call `close` inside another method
        self._state = threading.RLock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closed = False

    def fork(self) -> tuple[int, Connection]:
        """Starts a decoding process. Returns its process id and the trainer's end of its channel.

        Raises: OSError or EOFError if it cannot be started; the next call then starts a new server.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                pid = self._ask(worker.FORK, 0, theirs.fileno())
            except BaseException:
                ours.close()
                raise
        return pid, Connection(ours.detach())

    def end(self, pid: int, *, hangs: bool) -> int | None:
        """Waits for the end of a process whose channel is closed, or kills the process if it `hangs`.

        Returns: the exit code, negative for a signal; None if the process ended with its server.
        """
        try:
            code = self._ask(worker.KILL if hangs else worker.END, pid)
            return None if code == worker.NOT_MINE else code
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        """Ends the server and its processes. May be called from any thread, at any time and repeatedly."""
        with self._state:
            self._closed = True
            process = self._process
            if process is not None and not self._ready:
                process.kill()  # it has no children yet, and would notice the shutdown only after its imports
            if self._control is not None:
                with suppress(OSError):
                    self._control.shutdown(socket.SHUT_RDWR)  # also wakes a thread that waits for an answer
        if process is not None:
            try:
                process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._talk.acquire(timeout=CLOSE_S):
            try:
                self._forget()
            finally:
                self._talk.release()

    def _ask(self, wanted: bytes, pid: int, *descriptors: int) -> int:
        with self._talk:
            try:
                control = self._control
                if control is None and wanted == worker.FORK:
                    control = self._start()
                if control is None:
                    raise EOFError("there is no server")
                socket.send_fds(control, [worker.MESSAGE.pack(wanted, pid)], descriptors)
                _, answer = worker.MESSAGE.unpack(_receive(control, worker.MESSAGE.size))
                return answer
            except (EOFError, OSError):
                self._forget()
                raise

    def _start(self) -> socket.socket:
        """Starts the server and waits until it is ready. Raises: EOFError or OSError, also if `close` is called."""
        with self._state:
            if self._closed:
                raise EOFError("the server is closed")
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = self._launch(theirs.fileno())
            control = self._control
            control.settimeout(_ANSWER_S)
        _receive(control, len(worker.READY))
        with self._state:
            self._ready = True
        return control

    def _launch(self, control: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "univitar_ds.data.decoding.worker"]
        numbers = (self._slots.descriptor, self._slots.slots, self._slots.slot_bytes, control)
        # One thread per process, because `data.workers` is the number of cores to use.
        environment = {
            **safe_environment(os.environ),
            **_MEMORY,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with signals_held():
            return subprocess.Popen(
                [*command, *map(str, numbers), *self._needs],
                stdin=subprocess.DEVNULL,
                pass_fds=(self._slots.descriptor, control),
                env=environment,
            )

    def _forget(self) -> None:
        """Kills the server, which ends its processes, and closes the socket. The caller holds `_talk`."""
        with self._state:
            control, process = self._control, self._process
            self._control, self._process, self._ready = None, None, False
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            process.wait()


def _receive(control: socket.socket, size: int) -> bytes:
    data = control.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError("the server has ended")
    return data
