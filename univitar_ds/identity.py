"""The identity of this process in a cluster, and whether another process is still alive."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from univitar_ds.processes import Process

JOBS = {"slurm": "Slurm job", "torchrun": "torchrun"}
"""Names of the jobs of `this_job` in messages."""


def this_machine() -> dict[str, str]:
    """A process id is unique within one boot and one PID namespace; containers may share a host's name."""
    machine = {"host": socket.gethostname(), "boot": "", "namespace": ""}
    with suppress(OSError):
        machine["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    with suppress(OSError):
        machine["namespace"] = os.readlink("/proc/self/ns/pid")
    return machine


def this_process() -> list[int | None]:
    """The fields of its `Process`, for JSON; its start is None if the system does not give it."""
    process = Process.of(os.getpid())
    return [os.getpid(), None if process is None else process.started]


def this_job(environment: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The Slurm and torchrun jobs that this process belongs to, each with the number of its restarts."""
    jobs: dict[str, dict[str, Any]] = {}
    if job := environment.get("SLURM_JOB_ID"):
        jobs["slurm"] = {"id": job, "restarts": _number(environment.get("SLURM_RESTART_COUNT"))}
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        name = environment.get("TORCHELASTIC_RUN_ID", "none")
        if name in ("", "none"):  # torchrun's default name: two such jobs differ only by their address
            name = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
        jobs["torchrun"] = {"id": name, "restarts": _number(environment["TORCHELASTIC_RESTART_COUNT"])}
    return jobs


def restarted(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """A sentence on a job of `before` that was restarted since and is one of `now`; None if there is none."""
    for kind, job in now.items():
        earlier = before.get(kind)
        if earlier and earlier["id"] == job["id"] and job["restarts"] > earlier["restarts"]:
            return f"{JOBS[kind]} {job['id']} has restarted"
    return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
