"""Counts the kernels and the messages of a computation, on real ranks or in a fake process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "permute", "reshape", "select", "slice",
    "split", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
"""Operations of torch that compute nothing."""
MADE = {"empty", "empty_like", "empty_strided", "new_empty"}
"""Operations that only allocate memory."""


class Dispatches(TorchDispatchMode):
    """Counts operations by name while it is active: `kernels` that compute, `messages` between ranks.

    `sent`: bytes that a rank sends in ring collectives: the long tensor without a rank's share for an all-gather or a
    reduce-scatter, twice that for an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        space, _, name = str(operation).partition(".")
        name = name.partition(".")[0]
        if space == "c10d":
            self.messages[name] += 1
            self.sent += _sent_bytes(name, args)
        elif name not in VIEWS | MADE:
            self.kernels[name] += 1
        return operation(*args, **(kwargs or {}))


def _sent_bytes(name: str, arguments: tuple) -> float:
    if name.startswith("recv"):
        return 0.0
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    longest = max(tensor.numel() * tensor.element_size() for tensor in tensors)
    if name == "send":
        return longest
    objects = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.ScriptObject))
    (group,) = (each for each in objects if each._type().name() == "ProcessGroup")
    size = dist.ProcessGroup.unbox(group).size()
    return longest * (size - 1) / size * (2 if name.startswith("allreduce") else 1)


@contextmanager
def fake_process_group(size: int, rank: int = 0) -> Iterator[None]:
    """Makes this process rank `rank` of a fake process group without other processes.

    Every collective returns at once, with results of the right size and arbitrary values.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(fn, *inputs, **settings) -> Dispatches:
    """The operations of a call, without gradients."""
    with torch.no_grad(), Dispatches() as found:
        fn(*inputs, **settings)
    return found
