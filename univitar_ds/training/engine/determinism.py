"""Bitwise reproducible steps on a GPU, where some libraries add in the order in which threads finish."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """Sets whether torch uses deterministic operations in this process. The project's own kernels are always
    deterministic; the deterministic backward pass of attention is slower.

    Must be called before the first matrix product, since cuBLAS reads its setting once. torch warns about operations
    that have no deterministic form.
    """
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling new memory only helps to find bugs
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
