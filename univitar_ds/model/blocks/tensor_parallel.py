"""Tensor parallelism: each rank of a group has a slice of the weights of every block, in Megatron-Core's layers.

attn.qkv, mlp.fc1 and mlp.fc3 are column-parallel and attn.proj and mlp.fc2 row-parallel, so a rank has whole heads and
a part of the feed-forward width, and a block sums two results of (T, D) over the group. attn.q_norm, attn.k_norm and
mlp.norm are over the whole width: their sums of squares are summed over the group, forward and backward. Everything
else is whole on every rank, and every rank computes it from equal inputs.

Parameters keep the names of the whole encoder. Slices have two attributes: `slice` says which elements of the whole
parameter they have, and `tensor_model_parallel` marks them as slices for Megatron and DeepSpeed.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.extras import extra
from univitar_ds.formats.slices import Slice
from univitar_ds.kernels.dispatch import rope2d_qk_norm
from univitar_ds.model.blocks.layers import Attention, RMSNorm, SwiGLU
from univitar_ds.model.blocks.rank_group import RankGroup, sum_over
from univitar_ds.model.encoder import UniViTAR

QKV = 3
"""Number of parts of the rows of attn.qkv: q, k and v. A rank has its share of the rows of each part."""


def split_encoder(encoder: UniViTAR, group: RankGroup) -> None:
    """Replaces the weights of the blocks of a whole encoder by this rank's slices. The encoder must be on the CPU.

    Raises: InstallationError without the extra `megatron`.
    """
    for block in encoder.encoder["layers"]:
        block.attn = SplitAttention(block.attn, group)
        block.mlp = SplitSwiGLU(block.mlp, group)


class SplitNorm(nn.Module):
    """The weight of an RMSNorm over a width of which each rank has a part."""

    def __init__(self, whole: RMSNorm, group: RankGroup) -> None:
        super().__init__()
        self.weight = _slice(whole.weight, group)


class SplitAttention(Attention):
    """`Attention` with a rank's share of the heads."""

    def __init__(self, whole: Attention, group: RankGroup) -> None:
        nn.Module.__init__(self)
        self.group, self.heads = group, whole.heads // group.size
        self.theta, self.eps, self.backend = whole.theta, whole.eps, whole.backend
        self.qkv = _column(whole.qkv, group, parts=QKV)
        self.proj = _row(whole.proj, group)
        self.q_norm = None if whole.q_norm is None else SplitNorm(whole.q_norm, group)
        self.k_norm = None if whole.k_norm is None else SplitNorm(whole.k_norm, group)

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).view(x.shape[0], QKV, self.heads, -1)
        q, k, v = rope2d_qk_norm(qkv, positions, None, None, theta=self.theta, eps=self.eps)
        weights = self.external_parameters()
        if weights:
            both = torch.stack((q, k), 1).flatten(2)  # (T, 2, own heads * K)
            q, k = (
                split_rms_norm(both, torch.stack(weights), self.eps, self.group).view(len(q), 2, *q.shape[1:]).unbind(1)
            )
        return q, k, v


class SplitSwiGLU(SwiGLU):
    """`SwiGLU` with a part of the feed-forward width."""

    def __init__(self, whole: SwiGLU, group: RankGroup) -> None:
        nn.Module.__init__(self)
        self.group, self.eps = group, whole.norm.eps
        self.fc1 = _column(whole.fc1, group, disable_grad_reduce=True)
        self.fc2 = _row(whole.fc2, group)
        self.fc3 = _column(whole.fc3, group, disable_grad_reduce=True)
        self.norm = SplitNorm(whole.norm, group)

    def external_parameters(self) -> list[nn.Parameter]:
        """Returns weights of other modules that the forward uses."""
        return [self.norm.weight]

    def forward(self, x: Tensor) -> Tensor:
        """Maps (T, D) to (T, D)."""
        x = _Same.apply(x, self.group)  # sums the gradients of both layers and of all ranks at once
        gate, up = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (self.fc1(x), self.fc3(x)))
        normed = split_rms_norm(F.silu(gate) * up, self.norm.weight, self.eps, self.group)
        return self.fc2(normed.to(x.dtype))


def split_rms_norm(x: Tensor, weight: Tensor, eps: float, group: RankGroup) -> Tensor:
    """Returns the RMSNorm over a width of which each rank has the same number of values, with the shape of `x`.

    Args: x: (..., n); weight: (n,) or of more dimensions, of this rank's values.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = sum_over(wide.square().sum(-1, keepdim=True), group)
    root = torch.rsqrt(squares / (x.shape[-1] * group.size) + eps)
    return (wide * root * weight.to(wide.dtype)).to(x.dtype)


class _Same(torch.autograd.Function):
    """The identity, with the sum over a group in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group.group)
        return total, None


def _column(whole: nn.Linear, group: RankGroup, parts: int = 1, **options: Any) -> nn.Module:
    """Returns a column-parallel layer with this rank's share of each of `parts` equal parts of the rows of `whole`."""
    column, _, config = _megatron(group.size)
    layer = column(
        *(whole.in_features, whole.out_features, config, group, whole.bias is not None),
        gather_output=False,
        **options,
    )
    layer.weight = _slice(whole.weight, group, parts)
    if whole.bias is not None:
        layer.bias = _slice(whole.bias, group, parts)
    return layer


def _row(whole: nn.Linear, group: RankGroup) -> nn.Module:
    """Returns a row-parallel layer with this rank's share of the columns of `whole`."""
    _, row, config = _megatron(group.size)
    layer = row(
        *(whole.in_features, whole.out_features, config, group, whole.bias is not None),
        input_is_parallel=True,
        skip_bias_add=False,
    )
    layer.weight = _slice(whole.weight, group, whole.out_features)
    layer.bias = whole.bias
    return layer


def _slice(whole: nn.Parameter, group: RankGroup, parts: int = 1) -> nn.Parameter:
    """Returns this rank's slice of a parameter: an equal part of each of `parts` parts of its elements."""
    part = Slice(whole.numel() // parts // group.size, group.size, group.rank, tuple(whole.shape))
    shape = list(whole.shape)
    shape[1 if parts == len(whole) and whole.ndim > 1 else 0] //= group.size
    parameter = nn.Parameter(part.of(whole.detach()).view(shape).clone(), requires_grad=whole.requires_grad)
    parameter.slice, parameter.tensor_model_parallel = part, True
    return parameter


@cache
def _megatron(ranks: int) -> tuple[type, type, Any]:
    """Returns Megatron-Core's column-parallel and row-parallel layer with tensors as results, and their settings."""
    with extra("megatron"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing NVIDIA libraries that these layers do not need
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import layers

    layers.linear_with_grad_accumulation_and_async_allreduce.warned = True  # of a variable that must precede CUDA

    class Plain:
        """Base class of both layers: no entry `_extra_state` in the state dict, and a tensor as the result."""

        get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

        def __init__(self, width: int, out: int, config: Any, group: RankGroup, bias: bool, **options: Any) -> None:
            given = {"config": config, "init_method": None, "tp_group": group.group}
            super().__init__(width, out, bias=bias, **given, **options)
            self._load_state_dict_pre_hooks.clear()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class Column(Plain, layers.ColumnParallelLinear):
        pass

    class Row(Plain, layers.RowParallelLinear):
        def _forward_impl(self, **given: Any) -> Tensor:
            # A copy: Megatron sums over ranks in place, and a block with checkpoint_every: selective keeps the product.
            return super()._forward_impl(**given).clone()

    config = ModelParallelConfig(
        tensor_model_parallel_size=ranks,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
    )
    return Column, Row, config
