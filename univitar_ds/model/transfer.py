"""Copies small tensors to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to `device` without a synchronization."""
    if device.type == "cuda":
        host = host.pin_memory()  # a copy from pageable memory would synchronize
    return host.to(device, non_blocking=True)
