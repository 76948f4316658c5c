"""Free TCP ports for the processes that a launcher starts."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

_FIRST = 16384
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int = 1) -> list[int]:
    """Returns `count` different ports that no process of this machine uses now.

    The process that will use a port opens it seconds later. Meanwhile the system may give any port of the ephemeral
    range to an outgoing connection, so the ports are chosen at random below that range.
    """
    choice = random.SystemRandom()
    below = range(_FIRST, _first_ephemeral())
    ports: list[int] = []
    with ExitStack() as probes:
        for port in [*choice.sample(below, len(below)), *[0] * count]:  # 0: the system chooses
            if len(ports) == count:
                break
            probe = probes.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind(("", port))
                ports.append(probe.getsockname()[1])
    return ports


def _first_ephemeral() -> int:
    try:
        return int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):  # UnicodeError is a ValueError
        return _FIRST
