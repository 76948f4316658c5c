"""ZeRO-3 whose shards are spread over a group of ranks, such as those of a machine, instead of over all ranks.

Every group has the whole training state, as with hybrid sharding in FSDP. Weights are gathered and gradients scattered
within the group; once a step, before the update, gradient shards are summed over the ranks that have the same rank in
their groups. Every group then has the gradient of all ranks, so that what DeepSpeed computes from a group's shards
(norm, clipping, the check for values that are not finite) is correct for the whole run.

DeepSpeed 0.19.8 partitions a parameter over the process group in `ds_zero_partition_process_group`, which it reads for
expert-parallel layers. An `mpu` with a smaller data-parallel group would set a global of the process, and change the
batch size that DeepSpeed checks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from univitar_ds.config.deepspeed import NODE, SHARDING
from univitar_ds.errors import ConfigError
from univitar_ds.training.distributed.groups import own_group
from univitar_ds.training.distributed.process_group import World, gather_json


@dataclass(frozen=True)
class Sharding:
    """The group of ranks over which the training state of this rank is sharded.

    `rank`: this rank's rank in the group; `size`: ranks of the group; `copies`: groups of the run; `group`: the process
    group, and `across` that of the ranks with the same `rank` in all groups, both None if there is one group.
    """

    rank: int
    size: int
    copies: int = 1
    first: bool = True
    """Whether this is the group of rank 0, whose ranks write checkpoints."""
    group: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None

    def mark(self, module: nn.Module) -> None:
        """Makes DeepSpeed partition the parameters of `module` over the group. Must be called before it does so."""
        if self.group is not None:
            for parameter in module.parameters():
                parameter.ds_zero_partition_process_group = self.group

    def start_equal(self, optimizer: Any, module: nn.Module) -> None:
        """Copies the weights of the first group to all groups, as DeepSpeed does within a group.

        Trained parameters get them as master weights: `Engine.refresh_params` must be called afterwards."""
        if self.across is None:
            return
        frozen = [p.ds_tensor for p in module.parameters() if not p.requires_grad]
        for tensor in (*optimizer.fp32_partitioned_groups_flat, *frozen):
            dist.broadcast(tensor.data, src=self.rank, group=self.across)

    def agree_on_norms(self, optimizer: Any) -> None:
        """Makes all groups scale their gradients by the same norm. Sums of equal shards may round differently on
        machines with another topology, and the weights of the groups would diverge."""
        if self.across is None:
            return
        of_group = optimizer._get_norm_groups

        def agreed() -> list[Tensor]:
            norms = torch.stack(of_group())
            dist.all_reduce(norms, op=dist.ReduceOp.MAX, group=self.across)
            return list(norms.unbind())

        optimizer._get_norm_groups = agreed

    def sum_gradients(self, optimizer: Any) -> None:
        """Sums the gradient shards over all groups. Must be called once a step, after the last backward pass."""
        if self.across is not None:
            dist.all_reduce(optimizer.grad_partitions_flat_buffer, group=self.across)


def sharding_of(world: World, value: str | int | None) -> Sharding:
    """Returns the sharding for a value of the key SHARDING of a DeepSpeed JSON. All ranks call it.

    Args: value: NODE for the ranks of each machine, a number of consecutive ranks, or None for all ranks.
    Raises: ConfigError if machines have different numbers of ranks, or ranks are not numbered machine by machine.
    """
    size = world.size if value is None else _ranks_of_node(world) if value == NODE else int(value)
    if size == world.size:
        return Sharding(world.rank, world.size)
    group, across = _groups(dist.group.WORLD, world.rank, world.size, size)
    return Sharding(world.rank % size, size, world.size // size, world.rank < size, group, across)


def _ranks_of_node(world: World) -> int:
    names = gather_json(os.uname().nodename, world)
    size = names.count(names[0])
    blocks = [names[start : start + size] for start in range(0, world.size, size)]
    if any(len(block) < size or len(set(block)) > 1 for block in blocks) or len({b[0] for b in blocks}) < len(blocks):
        counts = ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(names))
        raise ConfigError(
            f"{SHARDING} is {NODE}, which needs the same number of ranks on each machine, numbered machine by machine; "
            f"the machines have {counts}; start equal numbers, or set {SHARDING} to a number of consecutive ranks"
        )
    return size


@lru_cache(maxsize=4)
def _groups(
    everybody: dist.ProcessGroup, rank: int, world_size: int, size: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Returns this rank's group and the one across groups. Cached, since each stage of a run builds an engine."""
    within = [range(start, start + size) for start in range(0, world_size, size)]
    across = [range(place, world_size, size) for place in range(size)]
    return own_group(within, rank), own_group(across, rank)
