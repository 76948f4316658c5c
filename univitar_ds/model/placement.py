"""Device and precision of a model that computes features outside of training.

On a GPU the precision is bfloat16, as in training: one call then computes the attention of all items of a pack, while
float32 needs a call for each item (`blocks.attention`). On the CPU it is the precision of the stored weights.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def feature_dtype(device: torch.device) -> torch.dtype | None:
    """Returns the precision of features on a device: bfloat16 on a GPU that supports it; None: as stored."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return None


def placed(model: Model, device: torch.device, dtype: torch.dtype | None = None) -> Model:
    """Returns a copy of a model on a device, with floating-point tensors of type `dtype`; None: of their own type.

    `model` is not changed. Its `exact_parameters` keep their type: they are few, and rounding them would change logits.
    """
    exact = {id(getattr(model, name)) for name in getattr(model, "exact_parameters", ())}
    copies: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        rounded = dtype is not None and tensor.is_floating_point() and id(tensor) not in exact
        moved = tensor.detach().to(device, dtype if rounded else tensor.dtype, copy=True)
        own = isinstance(tensor, nn.Parameter)
        copies[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if own else moved
    return copy.deepcopy(model, copies)  # makes no second copy of the weights on the host
