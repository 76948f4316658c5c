"""Gathers sharded matrices for a function that needs them whole, and scatters the results.

Every matrix has an owner, a rank that receives all its parts, so that each result is computed once and the ranks share
the work evenly. Parts are sent to the owners in one all-to-all, and the results back in another. In each, a rank sends
about as many bytes as its share of the matrices has, independent of the number of ranks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from univitar_ds.training.engine.node_sharding import Sharding


@dataclass(frozen=True)
class Part:
    """Where a matrix is stored. `shape`: of the whole matrix; `flat`: index of the flat master tensor; `offset`: of
    this rank's part in that tensor; `lengths`: elements on each rank of the group over which ZeRO shards."""

    shape: tuple[int, ...]
    flat: int
    offset: int
    lengths: tuple[int, ...]


class WholeMatrices:
    """The matrices in one flat tensor, of which each rank of a group has a shard."""

    def __init__(self, parts: Sequence[Part], sharding: Sharding, device: torch.device) -> None:
        """Args: parts: by matrix; device: of the rank, where the function runs; the flat tensor may be on the host."""
        self._rank, self._group, self._device = sharding.rank, sharding.group, device
        self._parts = parts
        owners = owners_of([multiplications(part.shape) for part in parts], sharding.size)
        self._order = sorted(range(len(parts)), key=lambda number: owners[number])
        """Indices of the matrices, ordered by owner: their order in all messages."""
        self._own = [number for number in self._order if owners[number] == self._rank]
        sent = [0] * sharding.size
        for number, part in enumerate(parts):
            sent[owners[number]] += part.lengths[self._rank]
        self._sent = sent
        """Elements that are sent to each rank, and as many results received from it."""
        self._pieces = [[parts[number].lengths[rank] for number in self._own] for rank in range(sharding.size)]
        """Elements of each of this rank's matrices that are received from each rank, and as many results sent back."""

    def apply(self, function: Callable[[Tensor], Tensor], flat: Tensor) -> list[Tensor]:
        """Applies a function to each whole matrix. All ranks of the group must call it.

        Args: function: maps an (n, m) tensor to one of the same shape and type; flat: this rank's values.
        Returns: this rank's part of each result, 1-D, in the order of the parts. The tensors may share memory.
        """
        ordered = [self._parts[number] for number in self._order]
        values = torch.cat([flat.narrow(0, part.offset, part.lengths[self._rank]) for part in ordered])
        values = values.to(self._device)
        pieces = [sum(lengths) for lengths in self._pieces]
        gathered = self._exchange(values, self._sent, pieces)
        results = self._exchange(self._of_whole(function, gathered), pieces, self._sent)
        parts: list[Tensor] = [results] * len(ordered)
        for number, part in zip(self._order, results.split([p.lengths[self._rank] for p in ordered]), strict=True):
            parts[number] = part
        return parts

    def _of_whole(self, function: Callable[[Tensor], Tensor], gathered: Tensor) -> Tensor:
        """Returns the results in the order of `gathered`: rank by rank, and of each rank matrix by matrix."""
        if not self._own:
            return gathered
        split = gathered.split([length for lengths in self._pieces for length in lengths])
        pieces = []
        for place, number in enumerate(self._own):
            part = self._parts[number]
            matrix = torch.cat(split[place :: len(self._own)]).view(part.shape)
            pieces.append(function(matrix).reshape(-1).split(list(part.lengths)))
        return torch.cat([piece for of_rank in zip(*pieces, strict=True) for piece in of_rank])

    def _exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if len(sent) == 1:
            return values
        result = values.new_empty(sum(received))
        dist.all_to_all_single(result, values, received, sent, group=self._group)
        return result


def multiplications(shape: Sequence[int]) -> int:
    """Returns the number of multiplications in a Newton-Schulz iteration on a matrix of this shape."""
    small, large = sorted(shape)
    return 2 * small * small * large + small**3


def owners_of(costs: Sequence[int], ranks: int) -> list[int]:
    """Returns the rank that works on each matrix: the largest first, each by the rank with the least work so far."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heapq.heappop(loads)
        owners[number] = rank
        heapq.heappush(loads, (load + costs[number], rank))
    return owners


def part_of_matrix(optimizer: Any, parameter: nn.Parameter, sharding: Sharding) -> Part:
    """Returns where DeepSpeed stores a trained matrix. Does not communicate, since all ranks partition in the same way.

    Args: optimizer: DeepSpeed's, of ZeRO 1, 2 or 3.
    """
    if hasattr(parameter, "ds_numel"):
        share = parameter.partition_numel()
        starts = (rank * share for rank in range(sharding.size))
        lengths = tuple(max(0, min(share, parameter.ds_numel - start)) for start in starts)
        flat, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return Part(tuple(parameter.ds_shape), flat, offset, lengths)
    name = "bit16_groups_flat" if hasattr(optimizer, "bit16_groups_flat") else "bf16_groups_flat"
    flat, begin, whole = _place(parameter, getattr(optimizer, name))
    share = whole // sharding.size
    offset = min(max(begin - sharding.rank * share, 0), share)
    edges = [min(max(rank * share - begin, 0), parameter.numel()) for rank in range(sharding.size + 1)]
    lengths = tuple(high - low for low, high in itertools.pairwise(edges))
    return Part(tuple(parameter.shape), flat, offset, lengths)


def _place(parameter: nn.Parameter, flats: Sequence[Tensor]) -> tuple[int, int, int]:
    """Returns the index of the flat tensor that holds a parameter, the parameter's first element in it, and its
    length."""
    for number, flat in enumerate(flats):
        first = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
        if 0 <= first <= flat.numel() - parameter.numel():
            return number, first, flat.numel()
    raise RuntimeError(f"the weights of shape {tuple(parameter.shape)} are in none of DeepSpeed's flat tensors")
