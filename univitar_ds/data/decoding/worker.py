"""The main program of the fork server, from which decoding processes are forked. `ForkServer` passes its arguments.

The server is not a copy of the trainer: it imports only modules that decoding needs (no FFmpeg for images) and starts
no thread. Forked processes start within milliseconds. Two thirds of the memory that each uses is shared with the
server. `forkserver.ForkServer` is the trainer's side.

Messages to decoding processes are JSON; pixels are written to shared memory. A process ends when the trainer closes its
end of the channel. When the trainer ends, all processes end, even in the middle of an image.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from struct import Struct
from typing import Literal

from univitar_ds.data.decoding.shared_slots import SharedSlots
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.geometry import Modality
from univitar_ds.processes import SIGNALS, die_with_parent

READY = b"ready"
MESSAGE = Struct("<cq")
"""A message on the control socket: a command and a process id. The answer is the command and a number."""
FORK, END, KILL = b"F", b"E", b"K"
"""FORK forks a process for the channel whose descriptor is sent along; the answer is the id of the process. END waits
for a process whose channel is closed, and kills it after `_FAREWELL_S`. KILL kills a process that hangs. The answer to
both is the exit code, negative for a signal, or `NOT_MINE`."""
NOT_MINE = 1 << 16
"""The process was forked by an earlier server and ended with it."""
Need = Modality | Literal["s3"]
_JOBS = ("univitar_ds.data.decoding.decode_job", "univitar_ds.data.decoding.probe_job", "univitar_ds.data.media.probe")
PRELOADED: Mapping[Need, Sequence[str]] = {
    "image": (*_JOBS, "univitar_ds.data.media.image_decode"),
    "video": (*_JOBS, "univitar_ds.data.media.video_decode"),
    "s3": ("univitar_ds.data.storage.s3",),
}
"""Modules for decoding each modality and for reading from S3. Imported before forking, they are in memory once."""
_FAREWELL_S = 5.0


def serve(slots: SharedSlots, channel: Connection) -> None:
    """Processes jobs until the channel closes.

    The first message is a `StorageSettings`. A request is {"slot", "start", "decode"}: a slot, the byte in it where the
    pixels begin, and a `DecodeJob`; or {"slot", "start", "probe"} with a `ProbeJob`. The answer is {"failures"} to a
    `DecodeJob` and {"failures", "sizes"} to a `ProbeJob`. If a shard cannot be read, it is {"data_error"}; for any
    other exception, it is {"fault"} with the traceback.
    """
    from univitar_ds.data.decoding.decode_job import DecodeJob, decode_pack
    from univitar_ds.data.decoding.probe_job import ProbeJob, probe_items
    from univitar_ds.data.media.memory_limits import confine
    from univitar_ds.errors import DataError

    settings = StorageSettings.from_json(json.loads(channel.recv_bytes()))
    done = slots.done
    channel.send_bytes(READY)
    while True:
        request = json.loads(channel.recv_bytes())
        slot = request["slot"]

        def count(slot: int = slot) -> None:
            done[slot] += 1

        try:
            if "probe" in request:
                probing = ProbeJob.from_json(request["probe"])
                confine(probing.max_image_px, probing.bytes_held)
                failures, sizes = probe_items(probing, settings, count)
                answer = {"failures": failures, "sizes": sizes}
            else:
                room = slots.view(slot)[request["start"] :]
                decoding = DecodeJob.from_json(request["decode"])
                confine(decoding.max_image_px, max((item.length for item in decoding.items), default=0))
                answer = {"failures": decode_pack(decoding, room, settings, count)}
        except DataError as error:
            answer = {"data_error": str(error)}
        except Exception:
            answer = {"fault": traceback.format_exc()}
        channel.send_bytes(json.dumps(answer).encode())


def run_server(slots: SharedSlots, control: socket.socket, needs: Sequence[Need]) -> None:
    """Forks and ends decoding processes on commands from the control socket. Ends all of them when it closes."""
    for need in needs:
        for module in PRELOADED[need]:
            importlib.import_module(module)
    from univitar_ds.data.media import resize

    resize.load()
    gc.collect()
    gc.freeze()  # otherwise garbage collection in a child would copy all memory pages
    alive: set[int] = set()
    control.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE.size, 1)
        if not message:
            break
        wanted, pid = MESSAGE.unpack(message)
        if wanted == FORK:
            (descriptor,) = descriptors
            pid = os.fork()
            if pid == 0:
                control.close()
                _decode(slots, descriptor)
            os.close(descriptor)
            alive.add(pid)
            answer = pid
        elif pid not in alive:
            answer = NOT_MINE
        else:
            alive.remove(pid)
            answer = _end(pid, 0.0 if wanted == KILL else _FAREWELL_S)
        control.sendall(MESSAGE.pack(wanted, answer))
    for pid in alive:
        _end(pid, 0.0)


def _decode(slots: SharedSlots, descriptor: int) -> None:
    """Runs a decoding process and does not return."""
    code = 0
    try:
        die_with_parent()
        serve(slots, Connection(descriptor))
    except (EOFError, ConnectionError):
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _end(pid: int, patience_s: float) -> int:
    """Waits up to `patience_s` for a process, then kills it. Returns the exit code.

    `pid` cannot be reused until this function has waited for the process.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(arguments: list[str]) -> None:
    # Ctrl-C is sent to the whole foreground group, and Slurm sends signals to all processes of a step, but the trainer
    # decides when the workers end.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    descriptor, slots, slot_bytes, control = map(int, arguments[:4])
    needs = [need for need in PRELOADED if need in arguments[4:]]
    try:
        run_server(SharedSlots(descriptor, slots, slot_bytes), socket.socket(fileno=control), needs)
    except ConnectionError:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
