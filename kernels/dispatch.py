"""Chooses the implementation of the fused operations: Triton on CUDA, plain or compiled torch on a CPU.

The implementation is chosen once for each device type and dtype, and logged with the reason. An implementation is a
module of this package with the functions of `OPERATIONS`, with the signatures of `kernels.reference`. The module is
imported when it is first chosen, so that a process without a GPU never loads triton. For debugging,
`UNIVITAR_DS_KERNELS` forces one implementation on every device.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from univitar_ds.errors import ConfigError

OPERATIONS = (
    "rms_norm", "rope2d_qk_norm", "swiglu_norm", "add_norm", "patch_embed", "sigmoid_pairs", "softmax_norms",
    "softmax_pairs",
)  # fmt: skip
IMPLEMENTATIONS = {
    "reference": "univitar_ds.kernels.reference",
    "triton": "univitar_ds.kernels.fused",
    "compiled": "univitar_ds.kernels.compiled",
}
VARIABLE = "UNIVITAR_DS_KERNELS"

log = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`."""
    return implementation(x.device.type, x.dtype).rms_norm(x, weight, eps)


def rope2d_qk_norm(
    qkv: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, theta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.reference.rope2d_qk_norm`."""
    chosen = implementation(qkv.device.type, qkv.dtype)
    return chosen.rope2d_qk_norm(qkv, positions, q_weight, k_weight, theta=theta, eps=eps)


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.swiglu_norm`."""
    return implementation(gate.device.type, gate.dtype).swiglu_norm(gate, up, weight, eps)


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.add_norm`."""
    return implementation(x.device.type, x.dtype).add_norm(x, branch, scale, weight, eps)


def patch_embed(
    pixels: Tensor,
    frames: Sequence[int],
    grid_thw: Sequence[Sequence[int]],
    weight: Tensor,
    bias: Tensor | None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    merge: int,
) -> Tensor:
    """See `kernels.reference.patch_embed`."""
    chosen = implementation(weight.device.type, weight.dtype)
    return chosen.patch_embed(pixels, frames, grid_thw, weight, bias, mean=mean, std=std, merge=merge)


def sigmoid_pairs(logits: Tensor, losses: Tensor, first: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """See `kernels.reference.sigmoid_pairs`."""
    implementation(logits.device.type, logits.dtype).sigmoid_pairs(logits, losses, first, ids)


def softmax_norms(
    logits: Tensor,
    row_norms: Tensor,
    column_norms: Tensor,
    counts: Tensor,
    sums: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """See `kernels.reference.softmax_norms`."""
    chosen = implementation(logits.device.type, logits.dtype)
    chosen.softmax_norms(logits, row_norms, column_norms, counts, sums, first, ids)


def softmax_pairs(
    logits: Tensor,
    row_shifts: Tensor,
    column_shifts: Tensor,
    weights: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """See `kernels.reference.softmax_pairs`."""
    implementation(logits.device.type, logits.dtype).softmax_pairs(
        logits, row_shifts, column_shifts, weights, first, ids
    )


def runs_plain_on_cpu(x: Tensor) -> bool:
    """Whether the operations on `x` run as plain torch on a CPU."""
    return x.device.type == "cpu" and implementation("cpu", x.dtype).__name__ == IMPLEMENTATIONS["reference"]


def compile_on_cpu(wanted: bool) -> None:
    """Sets whether the operations on a CPU run compiled in this process; the default is not compiled."""
    global _compile
    _compile = wanted
    implementation.cache_clear()


_compile = False


@cache
def implementation(device_type: str, dtype: torch.dtype) -> ModuleType:
    """Returns the module whose functions run on tensors of this device type and dtype.

    Raises: ConfigError if the value of `UNIVITAR_DS_KERNELS` is unknown, or is triton and triton is not installed.
    """
    name, reason = choose(device_type, dtype, os.environ.get(VARIABLE, "auto"))
    log.info("token-wise operations on %s in %s: %s (%s)", device_type, _plain(dtype), name, reason)
    return importlib.import_module(IMPLEMENTATIONS[name])


def choose(device_type: str, dtype: torch.dtype, asked: str = "auto") -> tuple[str, str]:
    """Returns a key of `IMPLEMENTATIONS`, and the reason for it in words.

    Args: asked: the value of `UNIVITAR_DS_KERNELS`. Raises: ConfigError as `implementation`."""
    if asked != "auto":
        return _forced(asked), f"{VARIABLE} asks for it"
    if device_type == "cpu" and _compile and dtype != torch.float64:
        return "compiled", "the run gains more than compiling costs"
    if device_type != "cuda":
        return "reference", f"no kernels for {device_type}"
    if dtype == torch.float64:
        return "reference", "the kernels compute in float32"
    if reason := _missing_requirement():
        return "reference", reason
    return "triton", "the fused kernels are made for it"


def _missing_requirement() -> str | None:
    """Returns the reason why Triton would fail, None if nothing is missing.

    Triton compiles a C extension of Python at the first launch of a kernel in a process."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    compilers = (os.environ["CC"],) if "CC" in os.environ else ("gcc", "clang")
    if not any(map(shutil.which, compilers)):
        return f"triton needs a C compiler and there is no {' or '.join(compilers)}; install gcc, or name one in CC"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if not (headers / "Python.h").is_file():
        return f"triton needs Python's headers and there is no {headers}/Python.h; install python3-dev"
    return None


def _forced(asked: str) -> str:
    if asked not in IMPLEMENTATIONS:
        raise ConfigError(f"{VARIABLE} is {asked!r}; choose one of {', '.join(('auto', *IMPLEMENTATIONS))}")
    if asked == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{VARIABLE} is triton, which is not installed; pip install triton, or unset it")
    return asked


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
