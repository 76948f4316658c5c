"""Checks the limits of each node: shared memory and open files."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, Found, Row
from univitar_ds.planning.sizes import amount
from univitar_ds.training.distributed.process_group import uses_cuda

SHARED_MEMORY, OPEN_FILES = "shared memory", "open files"
SHM = Path("/dev/shm")
SHM_OF_GPU_RANK = 128 << 20
"""Maximum bytes of /dev/shm that a rank on a GPU needs. NCCL uses it between GPUs of a node without peer-to-peer
access, with buffers of 4 MiB (NCCL_BUFFSIZE) for up to 32 channels."""
SHM_OF_CPU_RANK = 1 << 20
"""The same for a rank on a CPU: only semaphores are there, since batches are in anonymous files."""
FILES = 4096
"""Number of open files that a process of a run may need: each lane keeps a shard of each source open, a rank has
connections to the other ranks, and libraries open hundreds of files. Hundreds of sources need more."""


def shared_memory(ranks: int, each: int, folder: Path = SHM) -> Row:
    """Returns a row about the free space in /dev/shm. Args: ranks: on this node; each: bytes that a rank may need."""
    needed = ranks * each
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Row(SHARED_MEMORY, FAILED, f"{folder}: {error.strerror}", "mount a tmpfs there")
    text = f"{amount(usage.free)} of {amount(usage.total)} are free in {folder}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return Row(SHARED_MEMORY, FAILED, f"{folder} cannot be written", f"run chmod 1777 {folder} as root")
    if usage.free < needed:
        remedy = f"remove files of earlier jobs in {folder}, or enlarge it (docker --shm-size, mount -o remount,size=)"
        return Row(SHARED_MEMORY, FAILED, f"{text}, but {amount(needed)} are needed for {ranks} ranks", remedy)
    return Row(SHARED_MEMORY, OK, f"{text}; at most {amount(needed)} are needed")


def open_files(limits: tuple[int, int], needed: int = FILES) -> Row:
    """Returns a row about the limits of open files.

    It fails only if the hard limit is too low, because a run raises the soft limit itself.

    Args: limits: soft and hard limit, as `resource.getrlimit(RLIMIT_NOFILE)` returns them.
    """
    soft, hard = (_limit(value) for value in limits)
    text = f"the limits of open files are {soft} (soft) and {hard} (hard)"
    if limits[1] != resource.RLIM_INFINITY and limits[1] < needed:
        remedy = "raise the hard limit (ulimit -Hn, limits.conf, or LimitNOFILE of slurmd, which its tasks inherit)"
        return Row(OPEN_FILES, FAILED, f"{text}, but {needed:,} are needed", remedy)
    return Row(OPEN_FILES, OK, f"{text}; a run raises the soft limit as far as it needs")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _check(context: Context) -> Found:
    here = context.ranks.nodes[context.ranks.rank]
    ranks = context.ranks.nodes.count(here)
    each = SHM_OF_GPU_RANK if uses_cuda() else SHM_OF_CPU_RANK
    return Found([shared_memory(ranks, each), open_files(resource.getrlimit(resource.RLIMIT_NOFILE))])


CHECK = Check("limits", _check, "inspect this node: /dev/shm does not answer")
