"""Marks calls of torch.distributed that wait for other ranks, including DeepSpeed's, as a phase of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from univitar_ds.training.watch.phases import COLLECTIVES, phase

CALLS = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "gather",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@contextmanager
def marked_collectives() -> Iterator[None]:
    """During the body, calls of the functions of torch.distributed in CALLS, and waits for their results, are phases.

    DeepSpeed may keep references to these wrapped functions. After the body they only call torch's functions.
    """
    before = [(owner, name, getattr(owner, name)) for owner, names in _places() for name in names]
    for owner, name, function in before:
        setattr(owner, name, _marked(name if owner is dist else "waiting for a collective", function))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _places() -> Iterator[tuple[Any, tuple[str, ...]]]:
    yield dist, tuple(name for name in CALLS if hasattr(dist, name))
    yield dist.Work, ("wait",)


def _marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*arguments: Any, **options: Any) -> Any:
        with phase(COLLECTIVES, name):
            return function(*arguments, **options)

    return marked
