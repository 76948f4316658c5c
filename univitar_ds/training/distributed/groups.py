"""Groups of the ranks of a run: those that compute packs together, and those that have packs of their own.

Tensor parallelism sends the most data, so its ranks are consecutive and thus share a machine:

    rank = (reader * sequence_parallel + part of the pack) * tensor_parallel + slice of the weights

Every rank of a reader reads the same lanes. The ranks with the same slice of the weights, over all readers and parts of
packs, are a data-parallel group. ZeRO shards over it, and the loss is computed over the items of all its ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist

from univitar_ds.config.deepspeed import packs_per_rank
from univitar_ds.config.schema import RunConfig
from univitar_ds.model.blocks.rank_group import RankGroup
from univitar_ds.training.distributed.process_group import PEER_TIMEOUT, World


@dataclass(frozen=True)
class Groups:
    """The groups of this rank.

    `world`: all ranks; `data`: the data-parallel group, `world` itself without tensor parallelism; `tensor`: the ranks
    whose slices make up the weights; `sequence`: the ranks whose parts make up a pack. All of them include this rank.
    """

    world: World
    data: World
    tensor: RankGroup = RankGroup()  # noqa: RUF009
    sequence: RankGroup = RankGroup()  # noqa: RUF009

    @classmethod
    def alone(cls, world: World) -> Groups:
        """Returns the groups of a run without tensor and sequence parallelism."""
        return cls(world, world)

    @property
    def writes(self) -> bool:
        """Whether this rank reports values that are equal on all ranks of `tensor`."""
        return self.tensor.rank == 0

    @property
    def first_reader(self) -> bool:
        """Whether this rank reports the packs and lanes, which all ranks of its reader read."""
        return self.writes and self.sequence.rank == 0

    def lanes(self, config: RunConfig) -> list[int]:
        """Returns the lanes of this rank, a contiguous range. Raises: ConfigError as `packs_per_rank`."""
        each = packs_per_rank(config, self.world.size)
        reader = self.world.rank // (self.tensor.size * self.sequence.size)
        return list(range(reader * each, (reader + 1) * each))

    def of_data(self, by_rank: torch.Tensor) -> torch.Tensor:
        """Returns the rows of the data-parallel group. Args: by_rank: a row for each rank of the run."""
        return by_rank[self.tensor.rank :: self.tensor.size].contiguous()


class ModelParallel:
    """The argument `mpu` of `deepspeed.initialize`, with the names of Megatron's `parallel_state` that DeepSpeed calls.

    DeepSpeed 0.19 calls both the methods `*_model_parallel_*`, which Megatron-Core's `parallel_state` no longer has,
    and `*_tensor_model_parallel_*`. ZeRO shards over the data-parallel group. The gradient norm counts parameters that
    have the attribute `tensor_model_parallel` on every rank, and the others on the first rank of each tensor-parallel
    group.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._groups.data.group


def groups_of(config: RunConfig, world: World) -> Groups:
    """Returns the groups of this rank in a run. All ranks call it; the process groups are created once.

    Raises: ConfigError if the number of ranks does not fit the configuration.
    """
    packs_per_rank(config, world.size)
    tensor, sequence = config.model.tensor_parallel, config.model.sequence_parallel
    if tensor == sequence == 1:
        return Groups.alone(world)
    return _groups(dist.group.WORLD, world, tensor, sequence)


@lru_cache(maxsize=4)
def _groups(everybody: dist.ProcessGroup, world: World, tensor: int, sequence: int) -> Groups:
    ranks, each = world.size, tensor * sequence
    reader, part, place = world.rank // each, world.rank // tensor % sequence, world.rank % tensor
    found = Groups.alone(world)
    if tensor > 1:
        within = own_group([range(first, first + tensor) for first in range(0, ranks, tensor)], world.rank)
        across = own_group([range(first, ranks, tensor) for first in range(tensor)], world.rank)
        data = replace(world, rank=world.rank // tensor, size=ranks // tensor, group=across)
        found = replace(found, tensor=RankGroup(place, tensor, within), data=data)
    if sequence > 1:
        firsts = [first + one for first in range(0, ranks, each) for one in range(tensor)]
        within = own_group([range(first, first + each, tensor) for first in firsts], world.rank)
        found = replace(found, sequence=RankGroup(part, sequence, within))
    assert found.data.rank == reader * sequence + part
    return found


def own_group(all_ranks: Iterable[range], rank: int) -> dist.ProcessGroup:
    """Creates a process group of each range of ranks, and returns the one that has `rank`.

    All ranks of the run must call it with the same ranges in the same order."""
    created = {ranks: dist.new_group(list(ranks), timeout=PEER_TIMEOUT) for ranks in all_ranks}
    return next(group for ranks, group in created.items() if rank in ranks)
