"""Measures all-reduce over all ranks, within nodes and between nodes, and exchanges between pairs of nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from statistics import median, median_low
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Answers, Found, Row, outliers

NAME = "all-reduce"
LATENCIES, ROUNDS = 20, 5
"""Timed rounds of the small and of the large messages."""
BYTES_GPU, BYTES_CPU = 256 << 20, 8 << 20
"""Size of a large message on GPUs and on CPUs."""
SLOWER = 2.0
"""A node fails if the time of its link is more than this many times the median. Chosen, not measured."""
PAIRINGS = 3
"""Maximum number of nodes with which a node exchanges data in pairs."""
_LONGER = timedelta(hours=1)


def timed(work: Callable[[], Any], rounds: int, device: torch.device) -> list[float]:
    """Returns the seconds of each of `rounds` calls of `work`, after a call that is not timed."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def bus_factor(ranks: int) -> float:
    """Returns the ratio of the bus bandwidth of an all-reduce to its bytes per second, as nccl-tests defines it."""
    return 2 * (ranks - 1) / ranks


def pairings(nodes: int, most: int = PAIRINGS) -> list[list[tuple[int, int]]]:
    """Returns at most `most` rounds of pairs of nodes. In each round a node has at most one partner, and never the same
    one twice (circle method)."""
    places = [*range(nodes), *([None] if nodes % 2 else [])]
    rounds = []
    for _ in range(min(most, len(places) - 1)):
        pairs = zip(places[: len(places) // 2], reversed(places[len(places) // 2 :]), strict=True)
        rounds.append([(a, b) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _all_reduce(group: Any, numbers: Tensor, ranks: int) -> dict[str, float]:
    """Returns the latency of a small all-reduce in microseconds, and the bus bandwidth of a large one in GB/s."""
    device, small = numbers.device, numbers[:2]
    latency = median(timed(lambda: dist.all_reduce(small, group=group), LATENCIES, device))
    seconds = min(timed(lambda: dist.all_reduce(numbers, group=group), ROUNDS, device))
    return {"latency_us": 1e6 * latency, "gb_s": bus_factor(ranks) * numbers.numel() * 4 / seconds / 1e9}


def _check(context: Context) -> Found:
    world, ranks = context.world, context.ranks
    if world is None or world.size == 1:
        return Found()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # the current device is set per thread
    numbers = torch.zeros((BYTES_GPU if world.device.type == "cuda" else BYTES_CPU) // 4, device=world.device)
    values: dict[str, Any] = {"all": _all_reduce(None, numbers, world.size)}
    nodes = {name: [rank for rank, node in enumerate(ranks.nodes) if node == name] for name in set(ranks.nodes)}
    mine = nodes[ranks.nodes[ranks.rank]]
    if len(nodes) > 1:
        if len(mine) > 1:
            group = dist.new_group(mine, timeout=_LONGER, use_local_synchronization=True)
            values["within"] = _all_reduce(group, numbers, len(mine))
        firsts = sorted(members[0] for members in nodes.values())
        if ranks.rank in firsts:
            group = dist.new_group(firsts, timeout=_LONGER, use_local_synchronization=True)
            values["between"] = _all_reduce(group, numbers, len(firsts))
            values["pairs"] = _pairs(firsts, ranks.rank, numbers, group)
    return Found(values=values)


def _pairs(firsts: Sequence[int], rank: int, numbers: Tensor, group: Any) -> list[float]:
    """Exchanges data with the first rank of some other nodes, one after the other.

    Args: firsts: first rank of each node, in the order of the process group. Returns: GB/s in each direction, for each
        partner.
    """
    rates = []
    received = torch.empty_like(numbers)
    for pairs in pairings(len(firsts)):
        dist.barrier(group=group)
        for pair in pairs:
            members = [firsts[place] for place in pair]
            if rank in members:
                other = members[1 - members.index(rank)]
                rates.append(_exchange(numbers, received, other, group))
    return rates


def _exchange(numbers: Tensor, received: Tensor, other: int, group: Any) -> float:
    def both() -> None:
        sent = dist.P2POp(dist.isend, numbers, other, group)
        for request in dist.batch_isend_irecv([sent, dist.P2POp(dist.irecv, received, other, group)]):
            request.wait()

    return numbers.numel() * 4 / min(timed(both, ROUNDS, numbers.device)) / 1e9


def compare(answers: Answers) -> list[Row]:
    """Returns rows for all ranks, within nodes, between nodes, and for pairs of nodes. The second and the last name the
    slowest node, and fail if it is much slower than the median."""
    whole = answers.of("all")
    if not whole and len(answers.nodes) > 1:
        return [Row(NAME, SKIPPED, "not measured: the ranks are not connected, or did not answer")]
    if not whole:
        return [Row(NAME, SKIPPED, "one rank: start the doctor under srun or torchrun to measure the network")]
    worst = max(whole.values(), key=lambda numbers: numbers["latency_us"])
    rows = [Row(NAME, OK, f"all {len(answers.nodes)} ranks: {_written(worst)}", numbers=worst)]
    rows += _within(answers)
    between = answers.of("between")
    if between:
        numbers = between[min(between)]
        rows.append(
            Row(NAME, OK, f"between {len(between)} nodes, one rank of each: {_written(numbers)}", numbers=numbers)
        )
        rows += _links(answers)
    return rows


def _within(answers: Answers) -> list[Row]:
    rates = {answers.nodes[rank]: numbers for rank, numbers in answers.of("within").items()}
    if not rates:
        return []
    slowest = min(rates, key=lambda node: rates[node]["gb_s"])
    middle = median_low(numbers["gb_s"] for numbers in rates.values())
    text = f"within nodes: {middle:.3g} GB/s on the median node; slowest {slowest}: {_written(rates[slowest])}"
    if slowest not in outliers({node: 1 / numbers["gb_s"] for node, numbers in rates.items()}, SLOWER):
        return [Row(NAME, OK, text, numbers=rates[slowest])]
    remedy = f"leave it out (sbatch --exclude={slowest}), or compare `nvidia-smi topo -m` with another node"
    return [Row(NAME, FAILED, text, remedy, numbers=rates[slowest])]


def _links(answers: Answers) -> list[Row]:
    """Returns a row about the links between nodes. The rate of a node is that of its fastest exchange, so that a slow
    partner does not count against it."""
    rates = {answers.nodes[rank]: max(found) for rank, found in answers.of("pairs").items() if found}
    slow = outliers({node: 1 / rate for node, rate in rates.items()}, SLOWER)
    slowest = min(rates, key=lambda node: rates[node])
    numbers = {"slowest_gb_s": rates[slowest], "median_gb_s": median_low(rates.values())}
    text = f"pairs of nodes: {numbers['median_gb_s']:.3g} GB/s in each direction"
    if len(rates) > 2:
        text += f" on the median node; slowest {slowest} with {rates[slowest]:.3g} GB/s"
    if not slow:
        return [Row(NAME, OK, text, numbers=numbers)]
    remedy = (
        f"leave it out (sbatch --exclude={','.join(slow[:8])}), or inspect its network cards (ibstat, NCCL_DEBUG=INFO)"
    )
    return [Row(NAME, FAILED, text, remedy, numbers=numbers)]


def _written(numbers: dict[str, float]) -> str:
    return f"{numbers['gb_s']:.3g} GB/s (bus), {numbers['latency_us']:.0f} us"


CHECK = Check(
    NAME,
    _check,
    "a rank hangs, or NCCL uses a network that does not connect the nodes: see the row 'ranks', and set "
    "NCCL_SOCKET_IFNAME and NCCL_IB_HCA (slurm/env.sh), or start again with NCCL_DEBUG=INFO",
    everywhere=True,
    together=True,
    compare=compare,
)
