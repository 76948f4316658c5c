"""The numbers that `srun` gives its tasks, under the names that torch and DeepSpeed read."""

from __future__ import annotations

from collections.abc import MutableMapping

from univitar_ds.errors import ConfigError


def adopt_ranks(environment: MutableMapping[str, str]) -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK in a task that `srun` started together with others.

    Nothing changes where a launcher has set them, nor in a batch script, nor in a step of a single task: that is a
    shell, or the parent of local processes.

    Raises: ConfigError if nobody says where rank 0 is.
    """
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if absent:
        raise ConfigError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} tasks and {' and '.join(absent)} is not set; export "
            "the name of the first node and a free port before srun, as slurm/train.sbatch does"
        )
    # Slurm may show every task one GPU only, which then is number 0 for all of them.
    shown = environment.get("CUDA_VISIBLE_DEVICES", "")
    alone = bool(shown) and "," not in shown
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = "0" if alone else environment["SLURM_LOCALID"]
