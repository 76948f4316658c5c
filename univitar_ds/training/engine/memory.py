"""The memory of the parts of a training state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from univitar_ds.formats.elastic import EMA

GRADIENTS = ("grad_partitions_flat_buffer", "averaged_gradients", "fp32_groups_gradients_flat")
"""Attributes of DeepSpeed's optimizers that hold gradients. Each optimizer has some of them."""
MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def memory_by_part(module: nn.Module, optimizer: Any, teacher: nn.Module | None = None) -> dict[str, int]:
    """Returns the bytes of this rank's weights, gradients, optimizer (master weights and moments), average and teacher.

    Memory that several parts share is counted for the first of them. Memory that only a step uses (activations,
    gathered weights, buckets) is not counted.
    """
    seen: set[int] = set()
    weights = [getattr(one, "ds_tensor", one) for one in module.parameters()]
    weights += [*module.parameters(), *module.buffers()]
    states = [state for state in optimizer.optimizer.state.values() if isinstance(state, Mapping)]
    swapper = getattr(optimizer, "optimizer_swapper", None)  # for states on a disk, see `disk.OnDisk`
    buffers = [] if swapper is None else swapper.swap_buffer_manager.all_buffers
    parts: dict[str, Iterable[Any]] = {
        "weights": weights,
        "gradients": [
            *(one.grad for one in module.parameters()),
            *(getattr(optimizer, name, None) for name in GRADIENTS),
        ],
        "average": [state.get(EMA) for state in states],
        "optimizer": [*buffers, *states, *(getattr(optimizer, name, None) for name in MASTERS)],
        "teacher": [] if teacher is None else [*teacher.parameters(), *teacher.buffers()],
    }
    return {name: sum(_bytes(value, seen) for value in tree_leaves(list(held))) for name, held in parts.items()}


def _bytes(value: Any, seen: set[int]) -> int:
    """Returns the bytes of a tensor's storage, 0 if it is in `seen`. A parameter that is not gathered has no bytes."""
    if not isinstance(value, Tensor):
        return 0
    storage = value.untyped_storage()
    if storage._cdata in seen:
        return 0
    seen.add(storage._cdata)
    return storage.nbytes()
