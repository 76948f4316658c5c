"""The identity of this machine, process and job, and the detection of jobs that were restarted."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.processes import Process

JOB_LABELS = {"slurm": "Slurm job", "torchrun": "torchrun"}
"""Names, for messages, of the kinds of jobs that `this_job` returns."""


def this_machine() -> dict[str, str]:
    """Returns the host name, boot id and PID namespace; the last two are empty if they are unknown.

    A process id is unique only within one boot and one PID namespace, and containers may share a host name.
    """
    machine = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with suppress(OSError):
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with suppress(OSError):
        machine["namespace"] = os.readlink("/proc/self/ns/pid")
    return machine


def this_process() -> list[int | None]:
    """Returns the id and start time of this process as in `Process`; the time is None if it is unknown."""
    process = Process.of(os.getpid())
    return [os.getpid(), None if process is None else process.started]


def this_job(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the id and number of restarts of the Slurm and torchrun jobs that this process belongs to."""
    jobs: dict[str, dict[str, Any]] = {}
    if job := environment.get("SLURM_JOB_ID"):
        jobs["slurm"] = {"id": job, "restarts": _number(environment.get("SLURM_RESTART_COUNT"))}
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        name = environment.get("TORCHELASTIC_RUN_ID", "none")
        if name in ("", "none"):  # torchrun's default name: two such jobs differ only by their address
            name = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        jobs["torchrun"] = {"id": name, "restarts": _number(environment["TORCHELASTIC_RESTART_COUNT"])}
    return jobs


def restart_message(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """Returns a message about the first job of `now` that was restarted since `before`; None if no job was.

    Args: now, before: results of `this_job`.
    """
    for kind, job in now.items():
        earlier = before.get(kind)
        if earlier and earlier["id"] == job["id"] and job["restarts"] > earlier["restarts"]:
            return f"{JOB_LABELS[kind]} {job['id']} has restarted"
    return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
