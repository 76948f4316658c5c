"""Checks that each rank has a device, and that the ranks connect to one process group."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch

import univitar_ds
from univitar_ds.doctor.context import Check, Context
from univitar_ds.doctor.findings import FAILED, OK, SKIPPED, Answers, Found, Row, ranks_named
from univitar_ds.training.distributed.process_group import check_gpus, start_world

NAME = "ranks"
_LONGER = timedelta(hours=1)
"""Timeout of the process group. NCCL aborts the process at this timeout, so it must exceed the limit of the check."""


def _check_gpu(context: Context) -> Found:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    check_gpus(local + 1)
    context.usable = True
    return Found()


def _join(context: Context) -> Found:
    usable = context.ranks.all_of("usable", context.usable)
    if not all(usable.values()):  # the process group would wait for the rank without a device
        return Found([Row(NAME, SKIPPED, "not connected: a rank has no device that it can use")])
    context.world = start_world(_LONGER, context.ranks.root)
    device = context.world.device
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    values = {"device": torch.cuda.get_device_name(device) if gpu else "CPU", "threads": torch.get_num_threads()}
    package = str(Path(univitar_ds.__file__).parent)
    return Found(values={**values, "package": package} | ({"gpu": gpu} if gpu else {}))


def _compare(answers: Answers) -> list[Row]:
    if not answers.values or not answers.of("device"):
        return []
    counts = Counter(answers.nodes[rank] for rank in answers.values)
    each = sorted(set(counts.values()))
    span = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    devices = ", ".join(sorted(set(answers.of("device").values())))
    plural = "" if len(answers.values) == 1 else "s"
    nodes = f"{len(counts)} node{'' if len(counts) == 1 else 's'} ({span} on each)"
    rows = [Row(NAME, OK, f"{len(answers.values)} rank{plural} on {nodes}, all connected; {devices}")]
    rows += _differences(answers)
    return rows + _shared_gpus(answers)


def _differences(answers: Answers) -> list[Row]:
    remedies = {
        "device": "use nodes with one kind of GPU: in every step the fast ones wait for the slow ones",
        "package": "start all ranks from one checkout or environment",
        "threads": "set OMP_NUM_THREADS to one value: the number of threads changes the order of sums",
    }
    rows = []
    for name, remedy in remedies.items():
        found: dict[str, list[int]] = {}
        for rank, value in answers.of(name).items():
            found.setdefault(str(value), []).append(rank)
        if len(found) > 1:
            texts = [f"{value} on {ranks_named(ranks, answers.nodes)}" for value, ranks in found.items()]
            rows.append(Row(NAME, FAILED, f"{name} differs: {'; '.join(texts)}", remedy))
    return rows


def _shared_gpus(answers: Answers) -> list[Row]:
    by_gpu: dict[str, list[int]] = {}
    for rank, gpu in answers.of("gpu").items():
        by_gpu.setdefault(gpu, []).append(rank)
    remedy = "start one rank for each GPU (--ntasks-per-node = --gpus-per-node), without CUDA_VISIBLE_DEVICES"
    return [
        Row(NAME, FAILED, f"{ranks_named(ranks, answers.nodes)} share one GPU, {gpu}", remedy)
        for gpu, ranks in by_gpu.items()
        if len(ranks) > 1
    ]


GPU_CHECK = Check(NAME, _check_gpu, "the driver does not answer: run nvidia-smi on this node", everywhere=True)
CHECK = Check(
    NAME,
    _join,
    "the ranks reach the store but not each other: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network "
    "between the nodes (slurm/env.sh), and open the ports between them",
    everywhere=True,
    together=True,
    compare=_compare,
)
