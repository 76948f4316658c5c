"""Stand-ins for flash-attn 2, 3 and 4 with the real functions' arguments, which check what the real ones check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from univitar_ds.simulation.gpu import SimulatedGPU

MAX_HEAD_DIM = {"flash2": 256, "flash3": 256, "flash4": 256}
"""Maximum width of a head on Hopper, from the README and the checks of each package."""


class _Attention(torch.autograd.Function):
    """Saves and returns tensors as all versions do, without computing them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        count("forward")
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.count = count
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, _lse = ctx.saved_tensors
        if (dout.shape, dout.dtype, dout.device) != (out.shape, out.dtype, out.device):
            raise RuntimeError(f"dout is {list(dout.shape)} {dout.dtype} on {dout.device}, out is {list(out.shape)}")
        ctx.count("backward")
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _run(
    name: str, gpu: SimulatedGPU, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    cu_q, cu_k, max_q, max_k = bounds
    for label, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.device.type != "cuda" or tensor.dtype not in (torch.float16, torch.bfloat16) or tensor.ndim != 3:
            raise RuntimeError(f"{label} is {tensor.ndim}-dimensional {tensor.dtype} on {tensor.device}")
        if tensor.stride(-1) != 1:
            raise RuntimeError(f"the last dimension of {label} must be contiguous, its stride is {tensor.stride(-1)}")
        if tensor.shape[-1] % 8 or tensor.shape[-1] > MAX_HEAD_DIM[name]:
            raise RuntimeError(f"{label} has heads of {tensor.shape[-1]}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or k.shape != v.shape or q.shape[1] % k.shape[1]:
        raise RuntimeError(f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}")
    for label, bound in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if bound.device != q.device or bound.dtype != torch.int32 or bound.ndim != 1 or not bound.is_contiguous():
            raise RuntimeError(f"{label} is {bound.ndim}-dimensional {bound.dtype} on {bound.device}")
    if cu_q.shape != cu_k.shape:
        raise RuntimeError(f"{len(cu_q)} bounds of queries, {len(cu_k)} of keys")
    for label, longest in (("max_seqlen_q", max_q), ("max_seqlen_k", max_k)):
        if type(longest) is not int or longest < 1:
            raise RuntimeError(f"{label} is {longest!r}")

    def count(direction: str) -> None:
        gpu.record.launches[f"{name}.{direction}"] += 1

    return _Attention.apply(q, k, v, count)


def _flash2(gpu: SimulatedGPU) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        """Many arguments because they are those of flash-attn 2."""
        return _run("flash2", gpu, q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))[0]

    return flash_attn_varlen_func


def _flash3(gpu: SimulatedGPU) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
        return_attn_probs=False,
    ):  # fmt: skip
        """Many arguments because they are those of flash-attn 3."""
        return _run("flash3", gpu, q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))[0]

    return flash_attn_varlen_func


def _flash4(gpu: SimulatedGPU) -> Callable[..., Any]:
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        aux_tensors=None, return_lse=False,
    ):  # fmt: skip
        """Many arguments because they are those of flash-attn 4."""
        return _run("flash4", gpu, q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))

    return flash_attn_varlen_func


MODULES = {
    "flash2": (_flash2, "flash_attn"),
    "flash3": (_flash3, "flash_attn_interface"),
    "flash4": (_flash4, "flash_attn.cute"),
}


def function(name: str) -> Callable[..., Any]:
    """Returns the function of the installed version, as it is imported."""
    return sys.modules[MODULES[name][1]].flash_attn_varlen_func


@contextmanager
def installed(name: str, gpu: SimulatedGPU) -> Iterator[None]:
    """Makes one version of flash-attn importable."""
    make, path = MODULES[name]
    modules = {}
    for end in range(1, path.count(".") + 2):
        part = ".".join(path.split(".")[:end])
        modules[part] = ModuleType(part)
        modules[part].__spec__, modules[part].__path__ = ModuleSpec(part, None), []
    modules[path].flash_attn_varlen_func = make(gpu)
    from univitar_ds.model.blocks import attention

    sys.modules.update(modules)
    attention._chosen.cache_clear()
    try:
        yield
    finally:
        for part in modules:
            del sys.modules[part]
        attention._chosen.cache_clear()
