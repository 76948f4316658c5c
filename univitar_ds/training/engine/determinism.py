"""The same bits from the same step on a GPU, where some libraries add in whatever order threads arrive."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """For this process, from now on. The project's own kernels always do; attention's backward pass is slower so.

    Before the first matrix product: cuBLAS reads its setting once. What has no repeatable form warns.
    """
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over all new memory that finds faults only
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
