"""Attention over packed items: tokens attend only to tokens of the same item, without padding."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from univitar_ds.errors import ConfigError
from univitar_ds.geometry import cumulative
from univitar_ds.model.transfer import to_device

HALF = (torch.float16, torch.bfloat16)
FLASH = ("flash2", "flash3", "flash4")
FUNCTIONS = {  # module and function of each back end that has to be imported
    "flash2": ("flash_attn", "flash_attn_varlen_func"),
    "flash3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash4": ("flash_attn.cute", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
BACKWARD_FROM = (9, 0)
"""Compute capability from which flash-attn 4 has a backward pass. On 8.x only the forward pass runs."""
NO_DETERMINISTIC_BACKWARD = 12
"""Major compute capability on which flash-attn 4 has no deterministic backward pass: an assertion fails there."""
INSTALL = {
    "flash2": "pip install flash-attn --no-build-isolation",
    "flash3": "python setup.py install in hopper/ of github.com/Dao-AILab/flash-attention",
    "flash4": "pip install --pre flash-attn-4",
    "varlen": "part of torch from 2.10 on",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CuSeqlens:
    """Boundaries of the N items of a pack along its tokens.

    `lengths` and `max_length` stay on the host, so that the host never waits for the device; `cu_seqlens` (N + 1,)
    int32 is on the device of the tokens.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> CuSeqlens:
        """Returns the boundaries of items with these numbers of tokens, on `device`."""
        bounds = torch.tensor(cumulative(lengths), dtype=torch.int32)
        return cls(tuple(lengths), to_device(bounds, device))

    @property
    def max_length(self) -> int:
        """The maximum number of tokens of an item; 0 without items."""
        return max(self.lengths, default=0)


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which the choice of back end depends."""

    capability: tuple[int, int]
    name: str = "this GPU"

    def __str__(self) -> str:
        return f"{self.name} (compute capability {_dotted(self.capability)})"


NO_GPU = Gpu((0, 0), "no GPU")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: CuSeqlens,
    keys: CuSeqlens,
    backend: str = "auto",
    *,
    causal: bool = False,
) -> Tensor:
    """Computes softmax attention of the queries of each item over the keys of the same item.

    Args:
        q: (Tq, H, K); k, v: (T, H, K).
        queries, keys: boundaries of the items in q and in k, v; the numbers of items are equal.
        backend: see `choose_backend`.
        causal: whether a token attends only to itself and earlier tokens; queries and keys are then the same tokens.
    Returns: (Tq, H * K).
    Raises: ConfigError if `backend` cannot run here.
    """
    chosen = choose_backend(backend, q.device, q.dtype, q.shape[-1])
    if not keys.lengths or chosen == "sdpa":
        return _by_item(q, k, v, queries, keys, causal)
    packed = _varlen if chosen == "varlen" else _flash
    return packed(_load(chosen), q, k, v, queries, keys, causal).flatten(1)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Returns the back end for heads of `width`: sdpa, varlen, flash2, flash3 or flash4.

    Args: backend: a back end, flash for the best installed flash-attn, or auto for the fastest back end.
    Torch's deterministic algorithms restrict the choice to back ends with a deterministic backward pass.
    Raises: ConfigError if `backend` cannot run here.
    """
    gpu = _gpu(device) if device.type == "cuda" else NO_GPU
    return _chosen(backend, device.type, gpu, dtype, width, torch.are_deterministic_algorithms_enabled())


@cache
def _gpu(device: torch.device) -> Gpu:
    return Gpu(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


@cache
def _chosen(backend: str, device: str, gpu: Gpu, dtype: torch.dtype, width: int, deterministic: bool) -> str:
    name, reason = select(backend, device, gpu, dtype, width, deterministic=deterministic)
    _report(device, _plain(dtype), name, reason)
    return name


@cache
def _report(device: str, dtype: str, name: str, reason: str) -> None:
    """Logs each choice once, although heads of several widths may need it."""
    logger.info("attention on %s in %s: %s (%s)", device, dtype, name, reason)


def select(
    backend: str, device: str, gpu: Gpu, dtype: torch.dtype, width: int, *, deterministic: bool = False
) -> tuple[str, str]:
    """Returns the back end and the reason for it in words.

    Args: width: number of values per head; deterministic: whether the backward pass must be bitwise reproducible.
    Raises: ConfigError if `backend` cannot run with these arguments.
    """
    obstacles = {name: _obstacle(name, device, gpu, dtype, width, deterministic) for name in _order(gpu.capability)}
    able = [name for name, obstacle in obstacles.items() if not obstacle]
    wanted = [name for name in obstacles if backend in ("auto", name) or (backend == "flash" and name in FLASH)]
    chosen = next((name for name in wanted if name in able), None)
    if chosen is None:
        raise ConfigError(
            f"model.attention {backend} cannot run on {device} in {_plain(dtype)} with heads of {width}: "
            f"{'; '.join(f'{name} {obstacles[name]}' for name in wanted)}. Usable here: {', '.join(able)}, or auto"
        )
    if backend != "auto":
        return chosen, f"model.attention is {backend}"
    if device != "cuda":
        return chosen, "the others need a GPU"
    passed = "; ".join(f"{name} {obstacles[name]}" for name in obstacles if name not in able)
    return chosen, f"the fastest that can run here; {passed}" if passed else "the fastest"


def _order(capability: tuple[int, int]) -> tuple[str, ...]:
    """Returns the back ends, fastest first. flash-attn 2 is made for Ampere, 3 for Hopper and 4 for Blackwell."""
    flash = {9: ("flash3", "flash4", "flash2"), 8: ("flash2", "flash4", "flash3")}
    return (*flash.get(capability[0], ("flash4", "flash2", "flash3")), "varlen", "sdpa")


def _obstacle(name: str, device: str, gpu: Gpu, dtype: torch.dtype, width: int, deterministic: bool) -> str:
    """Returns why a back end cannot run, with a remedy; empty if it can run."""
    if name == "sdpa":
        return ""
    if device != "cuda":
        return "needs a GPU"
    capability = gpu.capability
    if capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or higher, {gpu} is below"
    if name == "flash4" and (obstacle := _no_backward(gpu, deterministic)):
        return obstacle
    if dtype not in HALF:
        return "needs bfloat16 or float16"
    widest = 256 if name != "flash4" or capability[0] == 9 else 128
    if width > widest or (width % 8 and name != "flash2"):  # flash2 pads the heads
        multiple = "" if name == "flash2" else "that is a multiple of 8 and "
        return f"needs a head width {multiple}of at most {widest}"
    try:
        _load(name)
    except ImportError as error:
        return f"is not installed ({INSTALL[name]})" if _absent(error) else f"does not import ({error})"
    return ""


def _no_backward(gpu: Gpu, deterministic: bool) -> str:
    """Returns why flash-attn 4 cannot train on a GPU; empty if it can.

    It is rejected for passes without gradients too: a pack that runs twice in a step must use the same back end twice.
    """
    if gpu.capability < BACKWARD_FROM:
        return (
            f"has no backward pass on {gpu}, only from compute capability {_dotted(BACKWARD_FROM)} on "
            f"(use flash2: {INSTALL['flash2']}; or varlen, which is {INSTALL['varlen']})"
        )
    if deterministic and gpu.capability[0] == NO_DETERMINISTIC_BACKWARD:
        return f"has no deterministic backward pass on {gpu} (use flash2 or varlen, or set deterministic: false)"
    return ""


def _absent(error: ImportError) -> bool:
    # Versions 2 and 4 share the package flash_attn: if one is missing, only the import of its function fails.
    return isinstance(error, ModuleNotFoundError) or "flash_attn_varlen_func" in str(error)


def _load(name: str) -> Callable[..., Any]:
    """Returns the function of a back end. Raises: ImportError."""
    module, function = FUNCTIONS[name]
    try:
        return getattr(importlib.import_module(module), function)
    except AttributeError as error:
        raise ImportError(str(error)) from error


def _flash(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, queries: CuSeqlens, keys: CuSeqlens, causal: bool
) -> Tensor:
    """Calls flash-attn 2, 3 or 4. They have these argument names in different orders, and some return a tuple."""
    result = function(
        q,
        k,
        v,
        cu_seqlens_q=queries.cu_seqlens,
        cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.max_length,
        max_seqlen_k=keys.max_length,
        causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return result[0] if isinstance(result, tuple) else result


def _varlen(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, queries: CuSeqlens, keys: CuSeqlens, causal: bool
) -> Tensor:
    window = {"window_size": (-1, 0)} if causal else {}
    return function(q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length, **window)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_item(q: Tensor, k: Tensor, v: Tensor, queries: CuSeqlens, keys: CuSeqlens, causal: bool) -> Tensor:
    # An empty pack becomes one empty item, so that gradients reach the weights that q, k and v were computed from.
    pieces = zip(
        q.split(queries.lengths or (0,)), k.split(keys.lengths or (0,)), v.split(keys.lengths or (0,)), strict=True
    )
    outputs = [
        F.scaled_dot_product_attention(*(piece.transpose(0, 1)[None] for piece in triple), is_causal=causal)[
            0
        ].transpose(0, 1)
        for triple in pieces
    ]
    return torch.cat(outputs).flatten(1)
