"""The process group of a run: its start, exchanges of small values, and errors that end all ranks.

It uses torch.distributed, not DeepSpeed. Functions take the `World` of the whole run unless their docstring says
otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from univitar_ds.config.deepspeed import lanes_per_rank
from univitar_ds.errors import ConfigError, UserError
from univitar_ds.model.transfer import to_device
from univitar_ds.training.distributed.rendezvous import connection_lost, meet

PEER_TIMEOUT = timedelta(minutes=10)
"""Maximum time that a rank waits for other ranks: a dead rank must not block a machine indefinitely."""
FIRST_TIMEOUT = timedelta(hours=1)
"""Maximum time that other ranks wait for work that rank 0 does alone, such as reading remote shards."""
HEARD_TIMEOUT = timedelta(seconds=30)
"""Maximum time that rank 0 waits after a failure until the other ranks have read its message."""
SLICE = timedelta(seconds=10)
"""Time after which a wait is repeated, since each new request detects whether the store still exists."""
DEVICES = Path("/dev")
_calls = itertools.count()
"""Number of calls of `rank_zero_first`, the same on all ranks: each call has its own keys in the store."""
_waits = itertools.count()
"""Number of calls of `wait_for_all`, the same on all ranks."""


class PeerFailure(UserError):
    """Raised on a rank that ends because another rank failed. The other rank raises the error itself."""

    all_ranks_know = True


def known_to_all(error: Exception) -> bool:
    """Returns whether all ranks raise for the same reason: a PeerFailure, an error that `all_ranks_or_none` raised, or
    an error of a class with `all_ranks_know`, such as DivergedError."""
    return getattr(error, "all_ranks_know", False)


@dataclass(frozen=True)
class World:
    """Rank, device and process group of this process."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """The process group of `rank` and `size`; None: all ranks of the run."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the group."""
        return self.rank == 0

    def lanes(self, count: int) -> list[int]:
        """Returns the lanes of this rank, a contiguous range of the `count` lanes.

        Raises: ConfigError if the number of ranks does not divide the number of lanes.
        """
        each = lanes_per_rank(count, self.size)
        return list(range(self.rank * each, (self.rank + 1) * each))


def uses_cuda() -> bool:
    """Returns whether this run computes on GPUs. With DS_ACCELERATOR=cpu neither torch nor DeepSpeed uses them."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def check_gpus(processes: int) -> None:
    """Checks that this machine has a usable GPU for each of `processes` processes, if the run uses GPUs.

    Raises: ConfigError if there are too few GPUs, or torch cannot use the GPUs of this machine.
    """
    if uses_cuda():
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise ConfigError(
                f"{processes} processes on this machine need a GPU each, but torch sees {gpus}; start at most {gpus} "
                f"(--nproc {gpus}), or set DS_ACCELERATOR=cpu to train on the CPU"
            )
    elif os.environ.get("DS_ACCELERATOR") != "cpu" and (evidence := _evidence_of_gpus()):
        raise ConfigError(
            f"{evidence}, but torch {torch.__version__} finds no GPU that it can use; {_cuda_remedy()}, or set "
            "DS_ACCELERATOR=cpu to train on the CPU"
        )


def start_world(timeout: timedelta = PEER_TIMEOUT, store: dist.Store | None = None) -> World:
    """Joins the process group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe. If they are not set, the group
    has one rank.

    Args: store: of a rendezvous that has already taken place; None: waits for the other ranks here.
    Raises: ConfigError if this rank has no usable GPU, see `check_gpus`; UserError if not all ranks join, see
        `rendezvous.meet`, or a rank ends before all are connected.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_gpus(local_rank + 1)
    cuda = uses_cuda()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if store is None:
            store = dist.HashStore() if size == 1 else meet(rank, size)  # a store in memory needs no free port
        try:
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("default_pg", store),
                rank=rank,
                world_size=size,
                timeout=timeout,
                # Without it, torch guesses the device from the rank, wrongly if nodes have different numbers of ranks.
                device_id=device if cuda else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise connection_lost(rank, size) from error
    return World(rank, size, local_rank, device)


def stop_world() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_json(value: Any, world: World) -> list[Any]:
    """Returns the values of all ranks of `world`, by rank; `world` may be a part of the run.

    Values should be small, since each rank receives all of them."""
    if world.size == 1:
        return [value]
    data = _encoded(value, world)
    lengths = _lengths(data, world)
    received = torch.empty(world.size * max(lengths), dtype=torch.uint8, device=world.device)
    dist.all_gather_single(received, _padded(data, max(lengths)), group=world.group)
    rows = received.view(world.size, max(lengths)).cpu()
    return [_decoded(row[:length]) for row, length in zip(rows, lengths, strict=True)]


def gather_json_to_main(value: Any, world: World) -> list[Any] | None:
    """Returns the values of all ranks of the run, by rank, on rank 0, and None on other ranks. All ranks call it."""
    if world.size == 1:
        return [value]
    data = _encoded(value, world)
    lengths = _lengths(data, world)
    padded = _padded(data, max(lengths))
    received = padded.new_empty(world.size if world.is_main else 0, len(padded))
    dist.gather(padded, list(received) if world.is_main else None, dst=0)
    if not world.is_main:
        return None
    # One copy with the data of all ranks: on a GPU the host waits for each copy.
    return [_decoded(row[:length]) for row, length in zip(received.cpu(), lengths, strict=True)]


def broadcast_json(value: Any, world: World) -> Any:
    """Returns the value of rank 0 on all ranks of the run. The values of other ranks are not used."""
    if world.size == 1:
        return value
    data = _encoded(value if world.is_main else None, world)
    length = torch.tensor([len(data)], device=world.device)
    dist.broadcast(length, src=0)
    if not world.is_main:
        data = torch.empty(int(length), dtype=torch.uint8, device=world.device)
    dist.broadcast(data, src=0)
    return _decoded(data)


def scatter_json(values: Sequence[Any] | None, world: World) -> Any:
    """Returns on each rank of the run the value that rank 0 has for it. All ranks call it.

    Args: values: on rank 0 one value for each rank; None on other ranks."""
    if world.size == 1:
        return values[0]
    encoded = [json.dumps(value).encode() for value in values] if world.is_main else []
    lengths = torch.tensor([len(data) for data in encoded] or [0] * world.size, device=world.device)
    dist.broadcast(lengths, src=0)
    lengths = lengths.tolist()
    mine = torch.empty(max(lengths), dtype=torch.uint8, device=world.device)
    content = bytearray(b"".join(data.ljust(len(mine)) for data in encoded))
    # One copy with the data of all ranks: on a GPU the host waits for each copy.
    parts = torch.frombuffer(content, dtype=torch.uint8).to(world.device).split(len(mine)) if encoded else None
    dist.scatter(mine, None if parts is None else list(parts), src=0)
    return _decoded(mine[: lengths[world.rank]])


def _encoded(value: Any, world: World) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(world.device)


def _decoded(data: torch.Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())


def _padded(data: torch.Tensor, length: int) -> torch.Tensor:
    padded = torch.zeros(length, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    return padded


def _lengths(data: torch.Tensor, world: World) -> list[int]:
    """Returns the lengths of the data of all ranks."""
    lengths = torch.empty(world.size, dtype=torch.int64, device=world.device)
    dist.all_gather_single(lengths, torch.tensor([len(data)], device=world.device), group=world.group)
    return lengths.tolist()


def gather_numbers(numbers: list[float], world: World) -> torch.Tensor:
    """Returns the numbers of every rank of `world`, (size, len(numbers)) float64 on the host, with one collective.

    `world` may be a part of the run."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if world.size == 1:
        return mine[None]
    received = torch.empty(world.size, len(numbers), dtype=mine.dtype, device=world.device)
    dist.all_gather_single(received.view(-1), to_device(mine, world.device), group=world.group)
    # Waits for the device: every caller continues with the numbers of the other ranks on the host.
    return received.cpu()


@dataclass
class Vote:
    """Results of `all_ranks_or_none`, the same on all ranks. `yes`: whether `ask` was true on any rank; `ready`:
    whether `ready` was true on all ranks; `counts`: (size, numbers) int64 on the host, the results of `count` by rank,
    or None without `count`."""

    yes: bool = False
    ready: bool = False
    counts: torch.Tensor | None = None


@contextmanager
def all_ranks_or_none(
    world: World,
    ask: Callable[[], bool] | None = None,
    count: Callable[[], Sequence[int]] | None = None,
    numbers: int = 1,
    ready: Callable[[], bool] | None = None,
) -> Iterator[Vote]:
    """Raises on all ranks after the body if the body raised on one of them. All ranks enter it; its end is a barrier.

    A body that can fail must not communicate with other ranks. The functions `ask`, `count` and `ready` are called
    after the body, and their results are sent in the message that reports failures. Each of them is passed on all ranks
    or on none.
    Args:
        ask, ready: see `Vote`.
        count: returns `numbers` integers. An error in it is treated as an error of the body.
    Yields: the `Vote`, which is filled after the body.
    Raises: the body's exception on ranks that failed; PeerFailure on ranks that succeeded.
    """
    failure: Exception | None = None
    vote, counted = Vote(), [0] * numbers
    try:
        yield vote
        if count is not None:
            counted = count()
    except Exception as error:
        failure = error
    flags = [failure is not None, ask is not None and ask(), ready is not None and ready()]
    totals = torch.tensor(flags, dtype=torch.int32)
    if count is not None:
        table = gather_numbers([*flags, *counted], world).long()
        totals, vote.counts = table[:, : len(flags)].sum(0), table[:, len(flags) :].contiguous()
    elif world.size > 1:
        totals = to_device(totals, world.device)
        dist.all_reduce(totals)
    failed, yes, prepared = totals.tolist()
    vote.yes, vote.ready = bool(yes), prepared == world.size
    if failed:
        messages = gather_json(str(failure) if failure is not None else None, world)
        if failure is not None:
            failure.all_ranks_know = True
            raise failure
        rank = next(r for r, message in enumerate(messages) if message is not None)
        raise PeerFailure(f"rank {rank} ended the run: {messages[rank]}")


def wait_for_all(world: World) -> None:
    """Waits until all ranks of the run have called it, without a time limit.

    The ranks wait at the store of the process group, since a collective must end within the group's timeout.
    Raises: UserError if rank 0 has ended."""
    if world.size == 1:
        return
    store = dist.PrefixStore(f"wait_for_all/{next(_waits)}", dist.distributed_c10d._get_default_store())
    if store.add("here", 1) == world.size:
        store.set("all", "")
    while True:
        try:
            return store.wait(["all"], SLICE)
        except dist.DistNetworkError as error:
            raise UserError("rank 0 has ended while others waited for it; see its output") from error
        except dist.DistStoreError:
            continue  # not yet


def rank_zero_first(world: World, work: Callable[[], object], timeout: timedelta = FIRST_TIMEOUT) -> None:
    """Runs `work` on rank 0 while the other ranks wait. If `work` fails, all ranks raise.

    The ranks wait at the store of the process group, since a collective must end within the group's timeout.
    Raises: the exception of `work` on rank 0. On other ranks PeerFailure if `work` fails, UserError if rank 0 does not
    answer within `timeout` or has ended.
    """
    if world.size == 1:
        work()
        return
    store = dist.PrefixStore(f"rank_zero_first/{next(_calls)}", dist.distributed_c10d._get_default_store())
    if not world.is_main:
        message = _error_of_rank_zero(store, timeout)
        if message is not None:
            if store.add("listeners", 1) == world.size - 1:
                store.set("heard", "")
            raise PeerFailure(f"rank 0 ended the run: {message}")
        return
    try:
        work()
    except Exception as failure:
        store.set("result", json.dumps(str(failure)))
        with suppress(dist.DistError):  # the timeout, if another rank has ended and reads nothing
            store.wait(["heard"], HEARD_TIMEOUT)  # the store may end with this process
        raise
    store.set("result", json.dumps(None))


def _error_of_rank_zero(store: dist.Store, timeout: timedelta) -> str | None:
    """Waits for rank 0. Returns the message of rank 0's error, None without one. Raises: as `rank_zero_first`."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store.wait(["result"], min(SLICE, timeout))
            return json.loads(store.get("result"))
        except dist.DistNetworkError as error:
            raise UserError("rank 0 ended without a message while it prepared the run; see its output") from error
        except dist.DistStoreError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank 0 has been preparing the run for longer than {timeout} (limit); see what it is waiting for, "
                    "or give it less to prepare: name a tokenizer in model.text.tokenizer"
                ) from error


def _evidence_of_gpus() -> str | None:
    """Returns a phrase with the evidence that this machine has GPUs for the run; None if it has none or hides them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "CROSS_SIZE" not in os.environ:  # DeepSpeed's launcher sets both, without GPUs too
        return f"CUDA_VISIBLE_DEVICES is {visible}" if re.match(r"\d|GPU-|MIG-", visible) else None
    if os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE is {os.environ['SLURM_GPUS_ON_NODE']}"
    if os.environ.get("SLURM_JOB_GPUS"):  # indices of GPUs: "0" is one GPU
        return f"SLURM_JOB_GPUS is {os.environ['SLURM_JOB_GPUS']}"
    node = min(DEVICES.glob("nvidia[0-9]*"), default=None)
    return None if node is None else f"{node} exists"


def _cuda_remedy() -> str:
    if torch.version.cuda is None:
        return "it was built without CUDA: install a CUDA build of torch"
    return f"it needs a driver for CUDA {torch.version.cuda}: check the driver's version with nvidia-smi"
