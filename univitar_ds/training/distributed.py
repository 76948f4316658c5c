"""The ranks of a run: how they find each other, agree and fail together. Knows torch.distributed only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from univitar_ds.config.deepspeed import lanes_per_rank
from univitar_ds.errors import UserError

PEER_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others before it gives up: a dead peer must not hold a machine for ever."""


class PeerFailure(UserError):
    """Another rank cannot go on. That rank tells the story; this one only ends in good order."""


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def lanes(self, count: int) -> list[int]:
        """The lanes of this rank, a contiguous range of `count` lanes.

        Raises: ConfigError if the number of ranks does not divide the number of lanes.
        """
        each = lanes_per_rank(count, self.size)
        return list(range(self.rank * each, (self.rank + 1) * each))


def start_world(timeout: timedelta = PEER_TIMEOUT) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe; one rank without them."""
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if size == 1:  # a store in memory needs no free port
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, local_rank, device)


def stop_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_json(value: Any, world: World) -> list[Any]:
    """What every rank gave, by rank. Small values only: each rank receives all of them."""
    if world.size == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)
    lengths = torch.empty(world.size, dtype=torch.int64, device=world.device)
    dist.all_gather_single(lengths, torch.tensor([data.numel()], device=world.device))
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=world.device)
    padded[: data.numel()] = data
    received = torch.empty(world.size * longest, dtype=torch.uint8, device=world.device)
    dist.all_gather_single(received, padded)
    rows = received.view(world.size, longest).cpu()
    return [json.loads(bytes(row[:length].tolist())) for row, length in zip(rows, lengths.tolist(), strict=True)]


def gather_numbers(numbers: list[float], world: World) -> torch.Tensor:
    """(size, len(numbers)) fp64 on the host: the numbers of every rank, in one exchange."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=world.device)
    if world.size == 1:
        return mine.cpu()[None]
    received = torch.empty(world.size * mine.numel(), dtype=torch.float64, device=world.device)
    dist.all_gather_single(received, mine)
    return received.view(world.size, -1).cpu()


@dataclass
class Vote:
    """`yes`: whether any rank said so at the end of a `together`; the same on all ranks."""

    yes: bool = False


@contextmanager
def together(world: World, ask: Callable[[], bool] | None = None) -> Iterator[Vote]:
    """A part that all ranks finish or none: a failure on one rank ends it on all, and nobody waits for ever.

    The body must not talk to other ranks where it can fail. It also is a barrier, and a vote on `ask`, which each
    rank answers when its body is done; all ranks ask or none.
    Raises: the body's own exception; PeerFailure on the ranks that were fine.
    """
    failure: Exception | None = None
    vote = Vote()
    try:
        yield vote
    except Exception as error:
        failure = error
    words = [failure is not None, ask is not None and ask()]
    heard = torch.tensor(words, dtype=torch.int32, device=world.device)
    if world.size > 1:
        dist.all_reduce(heard)
    failed, yes = heard.tolist()
    vote.yes = bool(yes)
    if failed:
        stories = gather_json(str(failure) if failure is not None else None, world)
        if failure is not None:
            raise failure
        rank = next(r for r, story in enumerate(stories) if story is not None)
        raise PeerFailure(f"rank {rank} ended the run: {stories[rank]}")
