"""The trainer's side of `worker`: decoding processes on demand, and how they ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Collection
from multiprocessing.connection import Connection

from univitar_ds.data import worker
from univitar_ds.data.ring import Ring
from univitar_ds.import_path import safe_environment

_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2 << 20), "MALLOC_TRIM_THRESHOLD_": str(6 << 20)}
"""Of glibc, for a decoding process: large pictures go back to the system at once, and at most 6 MiB are kept for the
next ones. By itself glibc would keep twice the largest picture's bytes for good; lower values cost page faults."""
_ANSWER_S = 120.0
_CLOSE_S = 10.0


class ForkServer:
    """Starts and ends decoding processes that write into `ring`. For any number of threads."""

    def __init__(self, ring: Ring, needs: Collection[worker.Need] = ("image", "video")) -> None:
        """Nothing is started yet. `needs` is what processes can do right after they start."""
        self._ring = ring
        self._needs = sorted(needs)
        self._talk = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        self._closed = False

    def fork(self) -> tuple[int, Connection]:
        """Start a decoding process; returns its id and the trainer's end of its channel.

        Raises: OSError or EOFError if it cannot be started; the next call tries everything anew.
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
        """End a process that has closed its channel or `hangs`.

        Returns: its exit code, negative for a signal; None if it went down with the server.
        """
        try:
            code = self._ask(worker.KILL if hangs else worker.END, pid)
            return None if code == worker.NOT_MINE else code
        except (EOFError, OSError):
            return None

    def close(self) -> None:
        """End the server and all processes it has started. Safe to call from any thread and again."""
        self._closed = True
        if self._process is None:
            return
        if not self._ready:  # it has no children yet, and would look at its socket only after its imports
            self._process.kill()
        if self._control is not None:
            self._control.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, wanted: bytes, pid: int, *descriptors: int) -> int:
        with self._talk:
            try:
                if self._control is None and wanted == worker.FORK:
                    self._start()
                if self._control is None:
                    raise EOFError
                socket.send_fds(self._control, [worker.MESSAGE.pack(wanted, pid)], descriptors)
                _, answer = worker.MESSAGE.unpack(self._receive(worker.MESSAGE.size))
                return answer
            except (EOFError, OSError):
                self._forget()
                raise

    def _start(self) -> None:
        if self._closed:
            raise EOFError
        self._control, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "univitar_ds.data.worker"]
        numbers = (self._ring.descriptor, self._ring.slots, self._ring.slot_bytes, theirs.fileno())
        # One thread each: there are as many processes as the user wants cores to be busy.
        environment = {
            **safe_environment(os.environ),
            **_MEMORY,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with theirs:
            self._process = subprocess.Popen(
                [*command, *map(str, numbers), *self._needs],
                stdin=subprocess.DEVNULL,
                pass_fds=(self._ring.descriptor, theirs.fileno()),
                env=environment,
            )
        if self._closed:  # too late for `close` to see the process
            raise EOFError
        self._control.settimeout(_ANSWER_S)
        self._receive(len(worker.READY))
        self._ready = True

    def _receive(self, size: int) -> bytes:
        assert self._control is not None
        data = self._control.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise EOFError("it has ended")
        return data

    def _forget(self) -> None:
        """Whatever is left of the server goes, with all its processes."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control, self._process, self._ready = None, None, False
