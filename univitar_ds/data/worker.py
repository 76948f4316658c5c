"""A decoding process: `python -m univitar_ds.data.worker RING SLOTS SLOT_BYTES CHANNEL` (file descriptors and sizes).

Started as a program of its own, not as a copy of the trainer: it imports what decoding needs and nothing else,
whatever the trainer's main module is. Messages are JSON; pixels go through the ring. It ends when the trainer closes
its end of the channel or is gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from univitar_ds.data.ring import Ring

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def start(ring: Ring) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a decoding process that writes into `ring`; returns it and the trainer's end of its channel."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "univitar_ds.data.worker"]
    numbers = (ring.descriptor, ring.slots, ring.slot_bytes, theirs.fileno())
    search = os.pathsep.join(filter(None, [PACKAGE_PARENT, os.environ.get("PYTHONPATH")]))
    # One thread each: there are as many processes as the user wants cores to be busy.
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with theirs:
        process = subprocess.Popen(
            [*command, *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            pass_fds=(ring.descriptor, theirs.fileno()),
            env=environment,
        )
    return process, Connection(ours.detach())


def serve(ring: Ring, channel: Connection) -> None:
    """Answer jobs until the channel closes.

    A request is {"slot", "job"}; the answer {"failures"}, {"data_error"} for a shard that cannot be read, or
    {"fault"}, a traceback, for a fault of the program.
    """
    from univitar_ds.data.render import RenderJob, render
    from univitar_ds.errors import DataError

    while True:
        request = json.loads(channel.recv_bytes())
        try:
            answer = {"failures": render(RenderJob.from_json(request["job"]), ring.view(request["slot"]))}
        except DataError as error:
            answer = {"data_error": str(error)}
        except Exception:
            answer = {"fault": traceback.format_exc()}
        channel.send_bytes(json.dumps(answer).encode())


def main(arguments: list[str]) -> None:
    # Ctrl-C goes to the whole foreground group; the trainer decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, slots, slot_bytes, channel = map(int, arguments)
    try:
        serve(Ring(descriptor, slots, slot_bytes), Connection(channel))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(sys.argv[1:])
