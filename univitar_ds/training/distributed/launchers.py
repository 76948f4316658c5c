"""Determines from the environment variables of launchers whether this process is one of several ranks, and which.

The variables may be left over in a shell (`salloc`, an earlier `export`, `mpirun` around everything), so they count
only if they are complete and consistent.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed.slurm import adopt_ranks

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun and DeepSpeed's launcher always set together."""
MOST_RANKS = 1 << 20
"""Maximum of WORLD_SIZE."""
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
"""Variables with the number of processes that an MPI launcher has started."""
LAUNCHED = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun and DeepSpeed's launcher set in their processes in addition to RANK_NAMES."""
_MPI = re.compile(r"(OMPI_COMM_WORLD|OMPI_UNIVERSE|PMI|PMI2|PMIX|MV2_COMM_WORLD|PALS)_.*|MPI_LOCAL(RANKID|NRANKS)")
_OTHERS = re.compile(
    r"(LOCAL_WORLD|LOCAL|GROUP_WORLD|ROLE_WORLD|CROSS)_SIZE|(GROUP|ROLE|NODE|CROSS)_RANK|ROLE_NAME|TORCHELASTIC_.*|"
    r"SLURM_(PROCID|LOCALID|NODEID|STEP_NUM_TASKS|STEP_TASKS_PER_NODE)"
)


def forget_launchers(environment: MutableMapping[str, str]) -> list[str]:
    """Removes all variables in which launchers number processes. Returns the names of the removed variables.

    Called by a process that starts ranks of its own, in which DeepSpeed and torch would read these variables.
    """
    names = sorted(n for n in environment if n in RANK_NAMES or _MPI.fullmatch(n) or _OTHERS.fullmatch(n))
    for name in names:
        del environment[name]
    return names


def is_rank(environment: MutableMapping[str, str]) -> bool:
    """Returns whether a launcher, `srun` included, started this process as a rank. If so, all RANK_NAMES are set.

    The variables of MPI are removed in any case, since DeepSpeed compares them with RANK_NAMES.
    Raises: ConfigError if the variables are incomplete, contradict each other or are not numbers.
    """
    for name in RANK_NAMES:
        if environment.get(name) == "":
            del environment[name]
    adopt_ranks(environment)
    present = [name for name in RANK_NAMES if name in environment]
    absent = [name for name in RANK_NAMES if name not in environment]
    # A batch script sets the address of rank 0 for all its steps, including steps of a single task.
    one_task = "SLURM_STEP_NUM_TASKS" in environment and not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present)
    if present and absent and not one_task:
        raise ConfigError(
            f"{_listed(present)} {'is' if len(present) == 1 else 'are'} set and {_listed(absent)} not, while a "
            f"launcher sets all five; {left_behind(present)}, or start all processes with torchrun, deepspeed or srun"
        )
    tasks, source = max((_integer(environment, name, "1"), name) for name in ("SLURM_STEP_NUM_TASKS", *MPI_SIZES))
    if not absent:
        _check_numbers(environment)
        size = int(environment["WORLD_SIZE"])
        if size < tasks and not any(name in environment for name in LAUNCHED):
            raise ConfigError(
                f"WORLD_SIZE is {size} and {source} {tasks}, so several processes would act as rank "
                f"{environment['RANK']}; {left_behind(RANK_NAMES)}"
            )
    elif tasks > 1:
        names = [name for name in environment if _MPI.fullmatch(name)]
        raise ConfigError(
            f"{source} is {tasks}: the ranks that mpirun sets are not read, and each process would train a separate "
            f"run; start the processes with torchrun, deepspeed or srun, or, if an earlier mpirun left the variable in "
            f"the shell, {_unset(names)}"
        )
    for name in [name for name in environment if _MPI.fullmatch(name)]:
        del environment[name]
    return not absent


def resume_command(run: Path, nproc: int | None = None) -> str:
    """Returns the command that continues a run. Args: nproc: as it was given; None: under another launcher."""
    command = f"train --resume {shlex.quote(str(run))}"
    if nproc is None:
        return f"`{command}` under the same launcher"
    return f"`univitar-ds {command} --nproc {nproc}`"


def left_behind(names: Iterable[str]) -> str:
    """Returns the remedy for variables `names` that no launcher of this run has set."""
    return f"if an earlier job left them in the shell, {_unset(names)}"


def _unset(names: Iterable[str]) -> str:
    options = " ".join(f"-u {name}" for name in names)
    return f"start with `env {options} univitar-ds train ...`, or give --nproc, which ignores them"


def _check_numbers(environment: MutableMapping[str, str]) -> None:
    size = _integer(environment, "WORLD_SIZE")
    limits = {
        "WORLD_SIZE": (1, MOST_RANKS),
        "RANK": (0, size - 1),
        "LOCAL_RANK": (0, size - 1),
        "MASTER_PORT": (1, 65535),
    }
    for name, (minimum, maximum) in limits.items():
        value = _integer(environment, name)
        if not minimum <= value <= maximum:
            allowed = f"{minimum} to {maximum}"
            condition = f" if WORLD_SIZE is {size}" if maximum == size - 1 else ""
            raise ConfigError(f"{name} is {value}, allowed is {allowed}{condition}; {left_behind(RANK_NAMES)}")


def _integer(environment: MutableMapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, which is not an integer; {left_behind([name])}") from None


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
