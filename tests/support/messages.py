"""Counts the kernels and the messages of a computation, on real ranks and in a pretended world."""

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
"""Operations that only reserve memory."""


class Dispatches(TorchDispatchMode):
    """Counts operations by name while it is active: `kernels` that compute, `messages` between ranks.

    `sent` are the bytes that a rank sends if collectives send round a ring: a gather or a reduce-scatter all of the
    long tensor but a rank's share, an all-reduce both.
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
def pretended_world(size: int, rank: int = 0) -> Iterator[None]:
    """Makes this process a rank of `size` that no other process answers; every message returns at once.

    What a message returns has the right size and no meaning.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def counted(fn, *inputs, **settings) -> Dispatches:
    """The dispatches of a call, without gradients."""
    with torch.no_grad(), Dispatches() as found:
        fn(*inputs, **settings)
    return found
