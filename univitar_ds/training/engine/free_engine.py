"""Frees the memory of an engine that is no longer used. DeepSpeed (0.19) keeps modules and optimizer reachable."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def free_engine(model: nn.Module, *owners: object) -> None:
    """Empties every tensor of a model and of the attributes of `owners`, also tensors that are still referenced.

    A cache of a ZeRO-3 class references the model, and the parameters reference the optimizer: without this, master
    weights, moments and gradients would stay on the device until the process ends.
    """
    for parameter in model.parameters():
        _empty(vars(parameter))  # ZeRO-3's shard on this rank is an attribute
    for owner in (*owners, *model.modules()):
        _empty(vars(owner))


def _empty(held: Any) -> None:
    if isinstance(held, Tensor):
        held.grad = None
        held.data = held.new_empty(0)
    elif isinstance(held, Mapping):
        for key, value in held.items():
            _empty(key)
            _empty(value)
    elif isinstance(held, list | tuple | set | deque):
        for value in held:
            _empty(value)
