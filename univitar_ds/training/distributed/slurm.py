"""Derives the variables that torch and DeepSpeed read from those that `srun` sets in its tasks."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, MutableMapping

from univitar_ds.errors import ConfigError

_MOST_NODES = 100_000
"""Maximum number of nodes to which a list is expanded, so that a wrong list does not fill the memory."""
_WHOLE = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PARTS = re.compile(r"([^\[\]]*)\[([^\[\]]*)\](.*)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def node_name(environment: Mapping[str, str]) -> str:
    """Returns Slurm's name of this node; outside of Slurm, or if several nodes share a machine, its host name."""
    return environment.get("SLURMD_NODENAME") or platform.node()


def nodes_of_step(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the nodes of this step, as `scontrol show hostnames` does; empty outside of Slurm, or for a
    list that cannot be read."""
    try:
        return _expanded(environment.get("SLURM_STEP_NODELIST", ""))
    except ValueError:
        return []


def _expanded(text: str) -> list[str]:
    """Raises: ValueError if `text` is not a list of nodes, such as "a[01-03,7]-x,login"."""
    found: list[str] = []
    for word in _WHOLE.findall(text):
        parts = _PARTS.fullmatch(word)
        if parts is None:
            found.append(word)
            continue
        before, ranges, after = parts.groups()
        rest = _expanded(after) or [""]
        for entry in ranges.split(","):
            match = _RANGE.fullmatch(entry)
            if match is None or len(found) > _MOST_NODES:
                raise ValueError(f"{entry!r} is not a range of nodes")
            first, last = match[1], match[2] or match[1]
            if int(last) - int(first) > _MOST_NODES:
                raise ValueError(f"{entry} has more than {_MOST_NODES} nodes")
            numbers = range(int(first), int(last) + 1)
            found += [f"{before}{number:0{len(first)}d}{end}" for number in numbers for end in rest]
    return found


def tasks_of_step(environment: Mapping[str, str]) -> int:
    """Returns the number of tasks that `srun` started, including this process; 1 outside of a step.

    Raises: ConfigError if SLURM_STEP_NUM_TASKS is not an integer."""
    value = environment.get("SLURM_STEP_NUM_TASKS") or "1"
    if not value.isdecimal():
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {value!r}, which is not an integer; Slurm sets it in its tasks, elsewhere start "
            "with `env -u SLURM_STEP_NUM_TASKS univitar-ds train ...`"
        )
    return int(value)


def adopt_ranks(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK in a task of an `srun` step with several tasks.

    Changes nothing if a launcher has set RANK, in a batch script, or in a step of a single task, which is a shell or
    the parent of local processes.

    Raises: ConfigError if the variables with the address of rank 0 or with the number of this task are not set.
    """
    tasks = tasks_of_step(environment)
    if "RANK" in environment or tasks == 1:
        return
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise ConfigError(
            f"srun started {tasks} tasks and {' and '.join(absent)} {verb} not set; export the name of the first node "
            "and a free port before srun, as slurm/train.sbatch does, or give --nproc to start processes on this "
            "machine"
        )
    # Slurm may make only one GPU visible to each task; that GPU has index 0 in every task.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    one_gpu = bool(visible) and "," not in visible
    numbers = ("SLURM_PROCID",) if one_gpu else ("SLURM_PROCID", "SLURM_LOCALID")
    absent = [name for name in numbers if name not in environment]
    if absent:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {tasks} and {' and '.join(absent)} is not set, so this process is not a task of "
            "srun; start with `env -u SLURM_STEP_NUM_TASKS univitar-ds train ...`, or give --nproc"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_RANK"] = "0" if one_gpu else environment["SLURM_LOCALID"]
