"""Small tensors on their way to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for what was launched there before."""
    if device.type == "cuda":
        host = host.pin_memory()  # from other memory the copy does wait
    return host.to(device, non_blocking=True)
