"""Checks how fast each rank computes. In a synchronous step all ranks wait for the slowest one."""

from __future__ import annotations

import time
from statistics import median_low

import torch

from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, Answers, Found, Row, outliers, ranks_named
from univitar_ds.training.distributed.process_group import uses_cuda

NAME = "speed"
ROUNDS = 10
SLOWER_GPU, SLOWER_CPU = 1.2, 2.0
"""A node fails if its time is more than this many times the median. GPUs of one kind differ by at most a tenth; CPU
cores are shared with other processes. Chosen, not measured."""


def operands(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two square matrices: (4096, 4096) in bfloat16 on a GPU, (512, 512) in float32 on a CPU."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    return torch.ones(size, size, device=device, dtype=dtype), torch.ones(size, size, device=device, dtype=dtype)


def work(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Computes 8 matrix products and waits until the device has finished them. This is what `_check` times."""
    for _ in range(8):
        pair[0] @ pair[1]
    if pair[0].is_cuda:
        torch.cuda.synchronize(pair[0].device)


def _check(context: Context) -> Found:
    device = context.world.device if context.world else torch.device("cuda" if uses_cuda() else "cpu")
    pair = operands(device)
    work(pair)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work(pair)
        times.append(time.perf_counter() - start)
    size = pair[0].shape[0]
    # The fastest round is the least disturbed by other processes on the machine.
    return Found(values={"seconds": min(times), "flops": 8 * 2 * size**3, "device": device.type})


def compare(answers: Answers) -> list[Row]:
    """Returns a row with the slowest node, failed if it is much slower than the median of the nodes."""
    seconds = answers.of("seconds")
    if not seconds:
        return []
    nodes = answers.by_node("seconds", max)
    flops, device = answers.values[min(seconds)]["flops"], answers.values[min(seconds)]["device"]
    median = median_low(nodes.values())
    slowest = max(nodes, key=lambda node: nodes[node])
    rank = max((rank for rank in seconds if answers.nodes[rank] == slowest), key=lambda rank: seconds[rank])
    numbers = {"median_tflops": flops / median / 1e12, "slowest_tflops": flops / nodes[slowest] / 1e12}
    text = f"{numbers['median_tflops']:.3g} TFLOP/s a rank"
    if len(nodes) == 1:
        return [Row(NAME, OK, text, numbers=numbers)]
    text += f" on the median node; the slowest node is {slowest} with {numbers['slowest_tflops']:.3g} TFLOP/s"
    late = outliers(nodes, SLOWER_GPU if device == "cuda" else SLOWER_CPU)
    if not late:
        return [Row(NAME, OK, text, numbers=numbers)]
    text += f" ({ranks_named([rank], answers.nodes)}), which takes {nodes[slowest] / median:.1f} times as long"
    others = f"; slow too: {', '.join(late[1:8])}" if len(late) > 1 else ""
    remedy = f"leave it out (sbatch --exclude={slowest}), or inspect its temperature, clocks and other processes"
    return [Row(NAME, FAILED, text + others, remedy, numbers=numbers)]


CHECK = Check(
    NAME, _check, "a matrix product does not finish on this rank: inspect its GPU", everywhere=True, compare=compare
)
