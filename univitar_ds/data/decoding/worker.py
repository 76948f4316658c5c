"""The process that decoding processes are forked from; its arguments are descriptors, sizes and needs, see `main`.

It is a program of its own, not a copy of the trainer: it imports what decoding needs and nothing else (no FFmpeg for
images), whatever the trainer's main module is, and starts no thread. The processes it forks share its memory, two
thirds of what each of them uses, and start within milliseconds. `forkserver.ForkServer` is the trainer's side of it.

Messages to decoding processes are JSON; pixels go through shared memory. The processes end when the trainer closes its
end of their channel. When the trainer is gone, all of them end, even in the middle of an image.
"""

from __future__ import annotations

import ctypes
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
from univitar_ds.processes import SIGNALS

READY = b"ready"
MESSAGE = Struct("<cq")
"""On the control socket: what is wanted and a process, answered by the same with a number."""
FORK, END, KILL = b"F", b"E", b"K"
"""Fork a process for the channel whose descriptor comes along: its id. End a process that has closed its channel, or
kill one that hangs: its exit code, negative for a signal, or `NOT_MINE`."""
NOT_MINE = 1 << 16
"""The process was forked by an earlier one of these, and is gone with it."""
Need = Modality | Literal["s3"]
_JOBS = ("univitar_ds.data.decoding.decode_job", "univitar_ds.data.decoding.probe_job", "univitar_ds.data.media.probe")
PRELOADED: Mapping[Need, Sequence[str]] = {
    "image": (*_JOBS, "univitar_ds.data.media.image_decode"),
    "video": (*_JOBS, "univitar_ds.data.media.video_decode"),
    "s3": ("univitar_ds.data.storage.s3",),
}
"""What decoding each modality and reading from S3 need: imported before forking, it is in memory once."""
_FAREWELL_S = 5.0
_PR_SET_PDEATHSIG = 1


def serve(slots: SharedSlots, channel: Connection) -> None:
    """Answer jobs until the channel closes.

    The first message says how shards are reached. A request is {"slot", "start", "decode"}, the slot and the byte in it
    where the pixels of a `DecodeJob` go, or {"slot", "start", "probe"} with a `ProbeJob`. The answer is {"failures"}
    and for a `ProbeJob` "sizes", {"data_error"} for a shard that cannot be read, or {"fault"}, a traceback, for a fault
    of the program.
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


def breed(slots: SharedSlots, control: socket.socket, needs: Sequence[Need]) -> None:
    """Fork and end decoding processes as the control socket says, until it closes; then end those there are."""
    for need in needs:
        for module in PRELOADED[need]:
            importlib.import_module(module)
    from univitar_ds.data.media import resize

    resize.load()
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every object
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
    """The life of a decoding process; does not return."""
    code = 0
    try:
        _die_with_parent()
        serve(slots, Connection(descriptor))
    except (EOFError, ConnectionError):
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _end(pid: int, patience_s: float) -> int:
    """Its exit code. Nobody else waits for it, so that `pid` is no other process's meanwhile."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _die_with_parent() -> None:
    """Have the kernel end a decoder that hangs when the process it was forked from was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    # Ctrl-C goes to the whole foreground group, Slurm's signals to all processes of a step; the trainer decides when
    # its workers end.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    descriptor, slots, slot_bytes, control = map(int, arguments[:4])
    needs = [need for need in PRELOADED if need in arguments[4:]]
    try:
        breed(SharedSlots(descriptor, slots, slot_bytes), socket.socket(fileno=control), needs)
    except ConnectionError:
        return


if __name__ == "__main__":
    main(sys.argv[1:])
