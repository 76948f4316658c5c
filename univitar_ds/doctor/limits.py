"""Limits of the machine: shared memory, open files, processes."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from univitar_ds.doctor.findings import FAILED, OK, Found, Row
from univitar_ds.doctor.scene import Check, Scene
from univitar_ds.planning.sizes import amount
from univitar_ds.training.distributed.process_group import uses_cuda

SHARED_MEMORY, OPEN_FILES = "shared memory", "open files"
SHM = Path("/dev/shm")
NEEDED_OF_A_GPU = 128 << 20
"""Bytes of /dev/shm that a rank on a GPU may take: NCCL exchanges through it where GPUs of a node reach each other in
no other way, with buffers of 4 MiB (NCCL_BUFFSIZE) for up to 32 channels."""
NEEDED_OF_A_CPU = 1 << 20
"""On a CPU the trainer's batches are in anonymous memory; only semaphores are here."""
FILES = 4096
"""Open files that a run is given where the hard limit allows: a lane keeps a shard of each source open, each rank has
a connection to the others, and libraries open hundreds. Lists of hundreds of sources need more."""


def shared_memory(ranks: int, each: int, folder: Path = SHM) -> Row:
    """Args: ranks: of this node; each: bytes that a rank may take."""
    needed = ranks * each
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Row(SHARED_MEMORY, FAILED, f"{folder}: {error.strerror}", "mount a tmpfs there")
    text = f"{amount(usage.free)} of {amount(usage.total)} are free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Row(SHARED_MEMORY, FAILED, f"{folder} cannot be written", "chmod 1777 it, as root")
    if usage.free < needed:
        remedy = "remove what ended jobs have left there, or make it larger (docker --shm-size, mount -o remount,size=)"
        return Row(SHARED_MEMORY, FAILED, f"{text}, {amount(needed)} are needed for {ranks} ranks", remedy)
    return Row(SHARED_MEMORY, OK, f"{text}, at most {amount(needed)} are needed")


def open_files(limits: tuple[int, int], needed: int = FILES) -> Row:
    """Args: limits: soft and hard, as `resource.getrlimit(RLIMIT_NOFILE)`. A run raises the soft one by itself."""
    soft, hard = (_written(value) for value in limits)
    text = f"limits of open files {soft} (soft) and {hard} (hard)"
    if limits[1] != resource.RLIM_INFINITY and limits[1] < needed:
        remedy = "raise the hard limit (ulimit -Hn, limits.conf, or LimitNOFILE of slurmd, which its tasks inherit)"
        return Row(OPEN_FILES, FAILED, f"{text}, {needed:,} are needed", remedy)
    return Row(OPEN_FILES, OK, f"{text}; a run raises the soft one as far as it needs")


def _written(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _look(scene: Scene) -> Found:
    here = scene.ranks.nodes[scene.ranks.rank]
    ranks = scene.ranks.nodes.count(here)
    each = NEEDED_OF_A_GPU if uses_cuda() else NEEDED_OF_A_CPU
    return Found([shared_memory(ranks, each), open_files(resource.getrlimit(resource.RLIMIT_NOFILE))])


CHECK = Check("limits", _look, "look at this node: /dev/shm does not answer")
