"""Device launches of an encoder block and the bytes of their tensors, counted on a CPU without running a kernel.

The Triton operations are dispatched as on a GPU and their launches are recorded instead of made. What a launch would
compute stays undefined, so only counts and sizes have a meaning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.kernels import dispatch, fused, gpu
from univitar_ds.model.blocks import layers
from univitar_ds.model.blocks.attention import CuSeqlens

PRODUCTS = ("aten.mm.default", "aten.addmm.default")
HOPPER = gpu.Limits(132, 227 * 1024, wide=True)


@dataclass
class Launches(TorchDispatchMode):
    """Counts launches and bytes by kind: product (a matrix product), attention, fused (Triton), other."""

    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if not (function.is_view or "empty" in name or "detach" in name or "_unsafe_view" in name):
            self.add("product" if name in PRODUCTS else "other", (args, kwargs, result))
        return result

    def add(self, kind: str, tensors: object) -> None:
        self.counts[kind] += 1
        self.sizes[kind] += sum(one.numel() * one.element_size() for one in tree_leaves(tensors) if _is_tensor(one))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Attention(torch.autograd.Function):
    """Replaces packed attention: one launch forward, and one backward that fills three new tensors."""

    counter: Launches

    @staticmethod
    def forward(context, q, k, v):
        _Attention.counter.add("attention", ())
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
        context.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(context, grad):
        _Attention.counter.add("attention", ())
        shape = (grad.shape[0], _Attention.heads, grad.shape[1] // _Attention.heads)
        return tuple(torch.empty(shape, dtype=grad.dtype) for _ in range(3))

    heads = 1


@contextmanager
def recorded(monkeypatch, counter: Launches, heads: int) -> Iterator[None]:
    """Dispatches a block as on a GPU, with launches recorded in `counter`."""
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "implementation", lambda device, dtype: fused)
        patch.setattr(gpu, "limits", lambda device: HOPPER)
        patch.setattr(gpu.Prepared, "launch", lambda kernel, grid, tensors, numbers: counter.add("fused", tensors))
        patch.setattr(layers, "attention", lambda q, k, v, *rest: _Attention.apply(q, k, v))
        patch.setattr(_Attention, "counter", counter, raising=False)
        patch.setattr(_Attention, "heads", heads)
        with counter:
            yield


def block_launches(monkeypatch, config: EncoderConfig, tokens: int) -> tuple[Launches, Launches]:
    """Returns the launches of the forward and of the backward pass of a block over one item, in bf16."""
    block = layers.Block(config, "auto").bfloat16()
    x = torch.zeros(tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.zeros_like(x)
    positions = torch.zeros(tokens, 2, dtype=torch.int64)
    spans = CuSeqlens((tokens,), torch.tensor([0, tokens], dtype=torch.int32))
    forward, backward = Launches(), Launches()
    with recorded(monkeypatch, forward, config.num_attention_heads):
        output = block(x, positions, spans)
    with recorded(monkeypatch, backward, config.num_attention_heads):
        output.backward(grad)
    return forward, backward


def kept_bytes(
    monkeypatch, config: EncoderConfig, tokens: int, block: torch.nn.Module | None = None, dtype=torch.bfloat16
) -> int:
    """Returns the bytes that the forward pass of a block keeps for its backward pass, without parameters.

    Args: block: default: a whole one."""
    block = (layers.Block(config, "auto") if block is None else block).to(dtype)
    own = {one.untyped_storage().data_ptr() for one in block.parameters()}
    x = torch.zeros(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    spans = CuSeqlens((tokens,), torch.tensor([0, tokens], dtype=torch.int32))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with recorded(monkeypatch, Launches(), config.num_attention_heads), hooks:
        output = block(x, torch.zeros(tokens, 2, dtype=torch.int64), spans)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
