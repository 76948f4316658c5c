"""One rank of the preflight: `python slurm/preflight.py RUN CONFIG [KEY=VALUE ...]`, started by preflight.sbatch.

All ranks join, compare their versions, read a file that another rank has written, read the run file, find the data, and
time a large all-reduce. The first error ends the preflight with a sentence and exit code 2.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from univitar_ds.config.deepspeed import AUTO, read_deepspeed, resolve_deepspeed
from univitar_ds.config.load import load_config
from univitar_ds.data.shards.sources import validate_sources
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import UserError
from univitar_ds.launch import leave
from univitar_ds.training.distributed.launchers import is_rank
from univitar_ds.training.distributed.process_group import (
    World,
    all_ranks_or_none,
    gather_json,
    start_world,
    stop_world,
)
from univitar_ds.training.engine.engine import versions

ROUNDS = 5


def main(arguments: list[str]) -> None:
    run, recipe, *overrides = arguments
    try:
        is_rank(os.environ)  # sets RANK, WORLD_SIZE and LOCAL_RANK
        world = start_world()
        _check(world, Path(run), recipe, overrides)
        stop_world()
    except UserError as error:
        leave(error)


def _check(world: World, run: Path, recipe: str, overrides: list[str]) -> None:
    report = print if world.is_main else lambda *_: None
    nodes = gather_json(os.uname().nodename, world)
    report(f"{world.size} ranks on {len(set(nodes))} nodes")
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    machines = gather_json({"device": device, "package": str(Path(__file__).parents[1]), **versions()}, world)
    with all_ranks_or_none(world):
        for rank, machine in enumerate(machines):
            if machine != machines[0]:
                raise UserError(
                    f"rank {rank} on {nodes[rank]} has {machine}, rank 0 has {machines[0]}; make the nodes equal"
                )
    report(f"all ranks are equal: {machines[0]}")
    _check_shared_disk(world, run.parent, nodes)
    report(f"every rank reads files in {run.parent} that another rank has written")
    with all_ranks_or_none(world):
        config = load_config(recipe, overrides)
        content = {} if config.deepspeed == AUTO else read_deepspeed(config.deepspeed)  # chosen when the run starts
        resolve_deepspeed(config, world.size, content, (recipe, config.deepspeed))
        shards = validate_sources(config.data.sources, config.stages, StorageSettings.of(config.data))
    report(f"every rank finds {len(shards)} shards; data.lanes = {config.data.lanes} fits {world.size} ranks")
    report(f"all-reduce: {_all_reduce_gbs(world):.1f} GB/s")


def _check_shared_disk(world: World, folder: Path, nodes: list[str]) -> None:
    """Reads a file that another rank has written. Raises: UserError if two ranks do not share the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    neighbour = (world.rank + 1) % world.size
    own, other = (folder / f".preflight-{rank}" for rank in (world.rank, neighbour))
    with all_ranks_or_none(world):
        own.write_text(nodes[world.rank], encoding="utf-8")
    try:
        with all_ranks_or_none(world):
            if not other.exists() or other.read_text(encoding="utf-8") != nodes[neighbour]:
                raise UserError(
                    f"{nodes[world.rank]} does not see the file that rank {neighbour} on {nodes[neighbour]} wrote to "
                    f"{folder}; RUN must be on a disk that all nodes share"
                )
    finally:
        own.unlink()


def _all_reduce_gbs(world: World) -> float:
    """Returns the gigabytes (1e9 bytes) per second of one rank's tensor that an all-reduce sums."""
    numbers = torch.ones((256 if world.device.type == "cuda" else 8) * 2**20 // 4, device=world.device)
    dist.all_reduce(numbers)
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(numbers)
    numbers.sum().item()  # waits until a GPU has finished
    return ROUNDS * numbers.numel() * 4 / (time.perf_counter() - start) / 1e9


if __name__ == "__main__":
    main(sys.argv[1:])
