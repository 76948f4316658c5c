"""Counts the kernels and the messages of a computation, on real ranks and in a pretended world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "expand", "permute", "reshape", "select", "slice",
    "split", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip
"""Operations of torch that compute nothing."""
MADE = {"empty", "empty_like", "empty_strided", "new_empty"}
"""Operations that only reserve memory."""


class Dispatches(TorchDispatchMode):
    """Counts operations by name while it is active: `kernels` that compute, `messages` between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        space, _, name = str(operation).partition(".")
        name = name.partition(".")[0]
        if space == "c10d":
            self.messages[name] += 1
        elif name not in VIEWS | MADE:
            self.kernels[name] += 1
        return operation(*args, **(kwargs or {}))


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
