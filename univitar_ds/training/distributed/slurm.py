"""The ranks of `srun`'s tasks, under the names that torch and DeepSpeed read."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from univitar_ds.errors import ConfigError


def tasks_of_step(environment: Mapping[str, str]) -> int:
    """The number of tasks that `srun` started with this process; 1 outside of a step. Raises: ConfigError if it is
    invalid."""
    value = environment.get("SLURM_STEP_NUM_TASKS") or "1"
    if not value.isdecimal():
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {value!r}, which is not an integer; Slurm sets it in its tasks, elsewhere start "
            "with `env -u SLURM_STEP_NUM_TASKS univitar-ds train ...`"
        )
    return int(value)


def adopt_ranks(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK in a task that `srun` started together with others.

    Nothing changes if a launcher has set them, in a batch script, or in a step of a single task, which is a shell or
    the parent of local processes.

    Raises: ConfigError if no variable has the address of rank 0 or the number of this task.
    """
    tasks = tasks_of_step(environment)
    if "RANK" in environment or tasks == 1:
        return
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if absent:
        raise ConfigError(
            f"srun started {tasks} tasks and {' and '.join(absent)} is not set; export the name of the first node and "
            "a free port before srun, as slurm/train.sbatch does, or give --nproc to start processes on this machine"
        )
    # Slurm may show each task only one GPU, which then has number 0 in all of them.
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    alone = bool(shown) and "," not in shown
    numbers = ("SLURM_PROCID",) if alone else ("SLURM_PROCID", "SLURM_LOCALID")
    absent = [name for name in numbers if name not in environment]
    if absent:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {tasks} and {' and '.join(absent)} is not set, so this is no task of srun; start "
            "with `env -u SLURM_STEP_NUM_TASKS univitar-ds train ...`, or give --nproc"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_RANK"] = "0" if alone else environment["SLURM_LOCALID"]
