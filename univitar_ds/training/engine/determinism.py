"""Bitwise reproducible steps on a GPU, where some operations add in the order in which threads finish."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from univitar_ds.errors import ConfigError, first_line

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Values of this environment variable with which cuBLAS is deterministic."""


def set_deterministic(wanted: bool) -> None:
    """Sets whether torch uses only deterministic operations in this process. The project's own kernels are always
    deterministic; the deterministic backward pass of attention is slower.

    Must be called before the first matrix product, since cuBLAS reads its setting once. `warn_only` is not used, since
    torch's attention, in packs and in the text tower, would then use its nondeterministic backward pass. An operation
    without a deterministic form therefore raises an error, see `explained`.
    Raises: ConfigError if `wanted` is true and the environment variable `WORKSPACE` has a value with which cuBLAS is
        not deterministic.
    """
    if wanted and os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise ConfigError(
            f"deterministic is true and the environment has {WORKSPACE}={os.environ[WORKSPACE]}, with which cuBLAS "
            f"is not deterministic; unset it, or set it to {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling new memory only helps to find bugs


@contextmanager
def explained(deterministic: bool) -> Iterator[None]:
    """Replaces torch's error about an operation without a deterministic form with a ConfigError that names the remedy.

    Other errors of the body, and all errors if `deterministic` is false, are raised unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if deterministic and "deterministic" in str(error) and "use_deterministic_algorithms" in str(error):
            raise ConfigError(
                f"deterministic is true, but an operation of the step has no deterministic form on this device: "
                f"{first_line(error)}. Set deterministic: false, or replace the operation if it is in a plugin"
            ) from error
        raise
