"""Sets the variables that torch and DeepSpeed read from the variables of `srun`'s tasks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from univitar_ds.errors import ConfigError


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
    """Sets RANK, WORLD_SIZE and LOCAL_RANK in a task of a `srun` step with several tasks.

    Nothing changes if a launcher has set RANK, in a batch script, or in a step of a single task, which is a shell or
    the parent of local processes.

    Raises: ConfigError if the variables with the address of rank 0 or with the number of this task are not set.
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
    # Slurm may make only one GPU visible to each task; that GPU has index 0 in every task.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    one_gpu = bool(visible) and "," not in visible
    numbers = ("SLURM_PROCID",) if one_gpu else ("SLURM_PROCID", "SLURM_LOCALID")
    absent = [name for name in numbers if name not in environment]
    if absent:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS is {tasks} and {' and '.join(absent)} is not set, so this is no task of srun; start "
            "with `env -u SLURM_STEP_NUM_TASKS univitar-ds train ...`, or give --nproc"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = str(tasks)
    environment["LOCAL_RANK"] = "0" if one_gpu else environment["SLURM_LOCALID"]
