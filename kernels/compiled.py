"""The fused operations on a CPU, with torch.compile making one loop of each forward and of each backward.

Names, shapes and precision are those of `kernels.reference`. Forward and backward are written by hand and compiled
separately: the code of an operation is the same with and without gradients and under activation checkpointing, and only
the inputs and one reciprocal root mean square per token are saved for the backward. Sizes are symbolic, so packs of any
length run the same code. The cosines and sines of a pack are computed outside of the loops, once for all layers, since
the loop over heads would compute them H times.

If the compiler fails, the same functions run as plain torch, and one message reports the reason. Shapes use
the letters of `kernels.reference`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from univitar_ds.kernels import reference
from univitar_ds.kernels.reference import patch_embed as patch_embed  # compiling it saves no time

log = logging.getLogger(__name__)


class Region:
    """A function of tensors that is compiled at its first call. The first tensor has T rows.

    Packs of at most one token run as plain torch, since torch.compile specialises on sizes 0 and 1.
    """

    failed = False
    """Whether the compiler has failed in this process. After a failure nothing is compiled."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = function
        self.compiled = torch.compile(
            function,
            dynamic=True,
            fullgraph=True,
            options={"compile_threads": 1},  # a function is one loop, which one compiler process compiles
        )

    def __call__(self, *inputs: Any) -> Any:
        # Detached: otherwise torch.compile would compile again for frozen weights.
        inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)
        if Region.failed or len(inputs[0]) < 2:
            return self.plain(*inputs)
        try:
            return self.compiled(*inputs)
        except Exception as error:  # dynamo, inductor, the C++ compiler and the linker raise errors of many classes
            result = self.plain(*inputs)  # an error in the inputs is raised here again by plain torch
            Region.failed = True
            log.warning(
                "torch.compile failed, the token-wise operations run as plain torch (%s); a C++ compiler such as g++ "
                "is needed, or model.compile off",
                _first_line(error),
            )
            log.debug("torch.compile failed", exc_info=error)
            return result


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.rms_norm`; x (T, D)."""
    return _Norm.apply(x, weight, eps)


def rope2d_qk_norm(
    qkv: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *, theta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.reference.rope2d_qk_norm`, which is called for encoders without norms of q and k."""
    if q_weight is None or k_weight is None:
        return reference.rope2d_qk_norm(qkv, positions, q_weight, k_weight, theta=theta, eps=eps)
    return _RopeNorm.apply(qkv, *_table(positions, qkv.shape[-1], theta), q_weight, k_weight, eps)


def swiglu_norm(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.reference.swiglu_norm`."""
    return _GatedNorm.apply(gate, up, weight, eps)


def sigmoid_pairs(logits: Tensor, losses: Tensor, first: int, ids: tuple[Tensor, Tensor] | None) -> None:
    """See `kernels.reference.sigmoid_pairs`."""
    if logits.shape[1] < 2:
        reference.sigmoid_pairs(logits, losses, first, ids)
    else:
        _sigmoid_pairs(logits, losses, torch.tensor(first), *(ids or (None, None)))


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
    if logits.shape[1] < 2:
        reference.softmax_norms(logits, row_norms, column_norms, counts, sums, first, ids)
    else:
        state = (row_norms, column_norms, counts, sums)
        _softmax_norms(logits, *state, torch.tensor(first), *(ids or (None, None)))


def softmax_pairs(
    logits: Tensor,
    row_shifts: Tensor,
    column_shifts: Tensor,
    weights: Tensor,
    first: int,
    ids: tuple[Tensor, Tensor] | None,
) -> None:
    """See `kernels.reference.softmax_pairs`."""
    if logits.shape[1] < 2:
        reference.softmax_pairs(logits, row_shifts, column_shifts, weights, first, ids)
    else:
        _softmax_pairs(logits, row_shifts, column_shifts, weights, torch.tensor(first), *(ids or (None, None)))


def add_norm(x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `kernels.reference.add_norm`."""
    return _AddNorm.apply(x, branch, scale, weight, eps)


# The contrastive losses. `first` is a tensor: the value of an int would be part of the compiled code.


def _positives(logits: Tensor, first: Tensor, own_ids: Tensor | None, ids: Tensor | None) -> Tensor:
    positive = torch.arange(logits.shape[1])[None, :] == torch.arange(logits.shape[0])[:, None] + first
    return positive if own_ids is None else positive | (own_ids[:, None] == ids[None, :])


@Region
def _sigmoid_pairs(logits: Tensor, losses: Tensor, first: Tensor, own_ids: Tensor | None, ids: Tensor | None) -> None:
    positive = _positives(logits, first, own_ids, ids)
    x = torch.where(positive, -logits, logits)
    share = torch.sigmoid(x)
    losses.copy_(F.softplus(x).sum(1))
    logits.copy_(torch.where(positive, -share, share))


@Region
def _softmax_norms(
    logits: Tensor, row_norms: Tensor, column_norms: Tensor, counts: Tensor, sums: Tensor, first: Tensor,
    own_ids: Tensor | None, ids: Tensor | None,
) -> None:  # fmt: skip
    positive = _positives(logits, first, own_ids, ids)
    row_norms.copy_(torch.logaddexp(row_norms, logits.logsumexp(1)))
    column_norms.copy_(logits.logsumexp(0))
    counts += positive.sum(1)
    sums += torch.where(positive, logits, 0.0).sum(1)


@Region
def _softmax_pairs(
    logits: Tensor, row_shifts: Tensor, column_shifts: Tensor, weights: Tensor, first: Tensor,
    own_ids: Tensor | None, ids: Tensor | None,
) -> None:  # fmt: skip
    shares = (logits + row_shifts[:, None]).exp() + (logits + column_shifts[None, :]).exp()
    logits.copy_(shares - torch.where(_positives(logits, first, own_ids, ids), weights[:, None], 0.0))


# RMSNorm: y = w x / r with r the root mean square. With g the gradient of y, and u = w g,
#   dx = (u - x mean(u x) / r^2) / r,    dw = sum over tokens of g x / r.


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y (T, D) in x's dtype, which is float32 or wider, and 1/r (T,)."""
    inverse = torch.rsqrt(x.square().mean(-1) + eps)
    return x * inverse[:, None] * weight.to(x.dtype), inverse


def _normed_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx (T, D) in x's dtype, which is float32 or wider, and dw (D,) in the weight's dtype."""
    scaled, inverse = grad * weight.to(x.dtype), inverse[:, None]
    along = (scaled * x).mean(-1, keepdim=True)
    return inverse * (scaled - x * (inverse * inverse * along)), (grad * x * inverse).sum(0).to(weight.dtype)


@Region
def _norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, inverse = _normed(_wide(x), weight, eps)
    return y.to(x.dtype), inverse


@Region
def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw = _normed_backward(_wide(grad), _wide(x), weight, inverse)
    return dx.to(x.dtype), dw


@Region
def _add_norm_forward(
    x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.addcmul(x, branch, scale)
    y, inverse = _normed(_wide(total), weight, eps)
    return total, y.to(x.dtype), inverse


@Region
def _add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dw = _normed_backward(_wide(grad), _wide(total), weight, inverse)
    dx = dx + _wide(grad_total)
    dscale = (dx * _wide(branch)).sum(0).to(scale.dtype)
    return dx.to(total.dtype), (dx * _wide(scale)).to(total.dtype), dscale, dw


@Region
def _gated_forward(gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(gate)
    y, inverse = _normed(wide * torch.sigmoid(wide) * _wide(up), weight, eps)
    return y.to(gate.dtype), inverse


@Region
def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = _wide(gate), _wide(up)
    sigmoid = torch.sigmoid(a)
    silu = a * sigmoid
    dy, dw = _normed_backward(_wide(grad), silu * b, weight, inverse)
    return (dy * b * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (dy * silu).to(up.dtype), dw


@Region
def _rope_forward(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = []
    for part, weight in ((0, q_weight), (1, k_weight)):
        rotated = _rotate(_wide(qkv[:, part]), cos, sin)
        y, inverse = _normed(rotated.flatten(1), weight, eps)
        results += [y.view_as(rotated).to(qkv.dtype), inverse]
    return tuple(results)


@Region
def _rope_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor,
    k_weight: Tensor, q_inverse: Tensor, k_inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of the projection and of both weights.

    The gradient of the rotated q (or k) is rotated back, which preserves the norm.
    Many arguments because a `Region` detaches each tensor argument, and does not look into containers.
    """
    dx, dw = [], []
    for part, grad, weight, inverse in ((0, grad_q, q_weight, q_inverse), (1, grad_k, k_weight, k_inverse)):
        x, grad, inverse = _wide(qkv[:, part]), _wide(grad), inverse[:, None, None]
        dw.append((grad * _rotate(x, cos, sin) * inverse).sum(0).flatten().to(weight.dtype))
        scaled = _rotate(grad * weight.to(x.dtype).view(grad.shape[1:]), cos, -sin)
        along = (scaled * x).mean((1, 2), keepdim=True)
        dx.append((inverse * (scaled - x * (inverse * inverse * along))).to(qkv.dtype))
    return torch.stack((*dx, grad_v), 1), *dw


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the planes (i, i + K/2) of every head: (T, H, K), (T, K/2), (T, K/2) -> (T, H, K)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""{(K, theta): (cosines, sines)} for each tensor of positions, as long as the tensor exists."""


def _table(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of a pack, each (T, K/2) float32."""
    cached = _tables.setdefault(positions, {})
    if (width, theta) not in cached:
        angles = reference.rope2d_angles(positions, width, theta, torch.float32)
        cached[width, theta] = angles.cos(), angles.sin()
    return cached[width, theta]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_norm_backward(grad, *ctx.saved_tensors), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, y, inverse = _add_norm_forward(x, branch, scale, weight, eps)
        ctx.save_for_backward(total, branch, scale, weight, inverse)
        return total, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_add_norm_backward(grad_total, grad, *ctx.saved_tensors), None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _gated_forward(gate, up, weight, eps)
        ctx.save_for_backward(gate, up, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gated_backward(grad, *ctx.saved_tensors), None


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, q_inverse, k, k_inverse = _rope_forward(qkv, cos, sin, q_weight, k_weight, eps)
        ctx.save_for_backward(qkv, cos, sin, q_weight, k_weight, q_inverse, k_inverse)
        return q, k, qkv[:, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        dqkv, dq_weight, dk_weight = _rope_backward(grad_q, grad_k, grad_v, *ctx.saved_tensors)
        return dqkv, None, None, dq_weight, dk_weight, None


def _wide(x: Tensor) -> Tensor:
    """Converts half precision to float32; wider tensors keep their dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
