"""The same bits from the same step on a GPU, where some libraries add in the order in which threads arrive."""

from __future__ import annotations

import os

import torch


def set_deterministic(wanted: bool) -> None:
    """Applies to this process from now on. The project's own kernels are always deterministic; attention's backward
    pass is slower with it.

    Call it before the first matrix product: cuBLAS reads its setting once. Operations without a deterministic form
    warn.
    """
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # fills all new memory, which only helps to find bugs
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
